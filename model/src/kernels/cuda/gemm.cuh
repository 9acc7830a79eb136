// The two GEMMs and the product that is not fused with another.
#pragma once

#include "decode.cuh"
#include "prefill.cuh"

// Rows times one matrix. `Rows` says where the rows of a tile come from and go to. Panels of a
// block: neighbours.
template <class Form, int PANELS, class Rows>
struct Product {
    typedef Form Weights;
    static constexpr bool FUSED = false;

    Rows at;
    const uint4* matrix;
    int inputs, outputs, block, rows;

    __device__ const uint4* panel(int i) const {
        return panel_of<Weights>(matrix, block * PANELS + i, inputs, outputs);
    }
    __device__ const uint4* row(int r) const { return at.from(r, inputs); }

    // Four outputs of panel `i`.
    __device__ void store(int r, int i, int quad, const float4& v) const {
        const int panel = block * PANELS + i;
        if (panel * PANEL < outputs) at.store(r, panel * PANEL + 4 * quad, outputs, v);
    }
};
