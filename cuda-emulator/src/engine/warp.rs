//! What the lanes of a warp do together once all of them are there.

use super::lane::{Arrival, Kind, Lane};

/// Lanes of a warp.
pub const LANES: usize = 32;

/// As in `device/prelude.h`.
#[repr(C)]
struct ShuffleDeposit {
    value: f32,
    operand: i32,
    result: f32,
}

/// As in `device/prelude.h`.
#[repr(C)]
struct MmaDeposit {
    c: *mut [f32; 4],
    a: *const [u32; 4],
    b: *const [u32; 2],
}

/// Does what all lanes have come for, when that is the warp's own business.
///
/// # Safety
/// All lanes must wait at an arrival of the same kind, with deposits of that kind.
pub unsafe fn meet(lanes: &[Lane], arrival: &Arrival) -> Result<(), String> {
    match arrival.kind {
        Kind::Block | Kind::Warp => Ok(()),
        // SAFETY: as the caller promises.
        Kind::Shuffle | Kind::ShuffleXor => unsafe { shuffle(lanes, arrival.kind) },
        Kind::Mma if lanes.len() < LANES => {
            Err(format!("a matrix product of a warp with {} lanes", lanes.len()))
        }
        // SAFETY: as the caller promises.
        Kind::Mma => unsafe { mma(lanes) },
    }
}

/// Each lane's deposit.
///
/// # Safety
/// As [`meet`], for deposits of type `T`.
unsafe fn deposits<T>(lanes: &[Lane]) -> impl Iterator<Item = *mut T> {
    lanes.iter().filter_map(|lane| lane.arrival.get()).map(|arrival| arrival.deposit.cast())
}

unsafe fn shuffle(lanes: &[Lane], kind: Kind) -> Result<(), String> {
    let mut values = [0.0; LANES];
    // SAFETY: as the caller promises.
    for (value, deposit) in values.iter_mut().zip(unsafe { deposits::<ShuffleDeposit>(lanes) }) {
        // SAFETY: a deposit lies on the stack of a lane that waits.
        *value = unsafe { (*deposit).value };
    }
    // SAFETY: as the caller promises.
    for (lane, deposit) in unsafe { deposits::<ShuffleDeposit>(lanes) }.enumerate() {
        // SAFETY: as above; nobody else looks at it before the lane goes on.
        let deposit = unsafe { &mut *deposit };
        let operand = deposit.operand as usize;
        let from = if kind == Kind::Shuffle { operand } else { lane ^ operand };
        if from >= lanes.len() {
            return Err(format!("lane {lane} asks for the value of lane {from}"));
        }
        deposit.result = values[from];
    }
    Ok(())
}

/// `c += a·b` with the 16 x 16 bf16 of a, the 16 x 8 bf16 of b and the 16 x 8 f32 of c spread over
/// the lanes as the PTX ISA says of `mma.m16n8k16`: lane 4·g + t holds, of a, rows g and g + 8 in
/// columns 2t and 2t + 1, then the same 8 columns on; of b, rows 2t and 2t + 1 of column g, then 8
/// rows on; of c, rows g and g + 8 in columns 2t and 2t + 1. The sum is made in ascending order and
/// rounded at every step; a tensor core rounds more coarsely, in an order that nobody tells.
unsafe fn mma(lanes: &[Lane]) -> Result<(), String> {
    let (mut a, mut b, mut c) = ([[0.0; 16]; 16], [[0.0; 8]; 16], [[0.0; 8]; 16]);
    // SAFETY: as the caller promises.
    for (lane, deposit) in unsafe { deposits::<MmaDeposit>(lanes) }.enumerate() {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        // SAFETY: a deposit points to arrays on the stack of a lane that waits.
        let (part_a, part_b, part_c) = unsafe { (*(*deposit).a, *(*deposit).b, *(*deposit).c) };
        for (i, pair) in part_a.into_iter().enumerate() {
            let (row, column) = (g + 8 * (i % 2), t + 8 * (i / 2));
            [a[row][column], a[row][column + 1]] = unpack(pair);
        }
        for (i, pair) in part_b.into_iter().enumerate() {
            [b[t + 8 * i][g], b[t + 8 * i + 1][g]] = unpack(pair);
        }
        [c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]] = part_c;
    }
    for (row_c, row_a) in c.iter_mut().zip(&a) {
        for (factor, row_b) in row_a.iter().zip(&b) {
            for (sum, value) in row_c.iter_mut().zip(row_b) {
                *sum += factor * value;
            }
        }
    }
    // SAFETY: as the caller promises.
    for (lane, deposit) in unsafe { deposits::<MmaDeposit>(lanes) }.enumerate() {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        // SAFETY: as above; nobody else looks at it before the lane goes on.
        unsafe { *(*deposit).c = [c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]] };
    }
    Ok(())
}

/// The two bf16 of a word, the low half first.
fn unpack(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}
