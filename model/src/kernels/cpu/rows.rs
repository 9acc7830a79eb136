//! Rows as they travel: rounded on their way out, widened and weighted on their way back.
//!
//! The rounding itself is [`Dtype`]'s, the one place for it; here its loops are compiled for the
//! instruction set.

use entente_proto::frame::Dtype;

use super::isa::{Isa, LANES, load_part, store_part};

/// Writes `values` as `dtype`.
#[inline(always)]
pub fn encode<I: Isa>(isa: I, dtype: Dtype, values: &[f32], out: &mut [u8]) {
    isa.enter(
        #[inline(always)]
        || dtype.encode_into(values, out),
    );
}

/// Values that are widened at a time: they stay in the first-level cache.
const PIECE: usize = 512;

/// `y += weight * row` for each part in order, multiplied and added in two rounded steps: the same
/// bits whatever the instruction set.
pub fn add_weighted<I: Isa>(isa: I, dtype: Dtype, parts: &[(f32, &[u8])], y: &mut [f32]) {
    isa.enter(
        #[inline(always)]
        || {
            let mut values = [0.0; PIECE];
            for (piece, y) in y.chunks_mut(PIECE).enumerate() {
                let values = &mut values[..y.len()];
                for (weight, row) in parts {
                    let bytes = &row[piece * PIECE * dtype.size()..][..y.len() * dtype.size()];
                    dtype.decode(bytes, values);
                    add_scaled(isa, *weight, values, y);
                }
            }
        },
    );
}

/// `y += weight * x`
#[inline(always)]
fn add_scaled<I: Isa>(isa: I, weight: f32, x: &[f32], y: &mut [f32]) {
    let weight = isa.splat(weight);
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for (x, y) in x.iter().zip(y) {
        isa.store(isa.add(isa.load(y), isa.mul(weight, isa.load(x))), y);
    }
    let rest = isa.mul(weight, load_part(isa, x_rest));
    store_part(isa, isa.add(load_part(isa, y_rest), rest), y_rest);
}
