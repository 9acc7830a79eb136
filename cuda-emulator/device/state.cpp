// What the engine sets and kernels read.

#include "prelude.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {

// The linker gives the ends of a section whose name is a word of C.
extern char __start_entente_shared[], __stop_entente_shared[];

void entente_emulator_set_thread(unsigned x, unsigned y, unsigned z) { threadIdx = {x, y, z}; }
void entente_emulator_set_block(unsigned x, unsigned y, unsigned z) { blockIdx = {x, y, z}; }

void entente_emulator_set_shape(const unsigned* grid, const unsigned* block) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
}

void entente_emulator_poison_shared() {
    memset(__start_entente_shared, 0xff, __stop_entente_shared - __start_entente_shared);
}

}
