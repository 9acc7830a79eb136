//! How the values of a row are written: the one place where a row is rounded.
//!
//! Every row of every exchange goes through here, there and back, so the loops are written without
//! branches: only so do compilers make vector instructions of them. They are inlined where the
//! kernels call them, and become the widest that the processor has.

/// How the values of a row are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32, little-endian.
    F32,
    /// The upper half of binary32, rounded to nearest even.
    Bf16,
}

impl Dtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Writes `values` to `out` in this form; the lengths must agree. This is the one place where a
    /// row is rounded: what is sent again after a failure is these same bytes.
    #[inline]
    pub fn encode_into(self, values: &[f32], out: &mut [u8]) {
        debug_assert_eq!(out.len(), values.len() * self.size());
        match self {
            Self::F32 => {
                for (value, bytes) in values.iter().zip(out.chunks_exact_mut(4)) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
            Self::Bf16 => {
                for (value, bytes) in values.iter().zip(out.chunks_exact_mut(2)) {
                    bytes.copy_from_slice(&round(*value).to_le_bytes());
                }
            }
        }
    }

    /// Appends `values` to `out` in this form.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + values.len() * self.size(), 0);
        self.encode_into(values, &mut out[start..]);
    }

    /// Reads `bytes` into `out`; the lengths must agree, which frames guarantee.
    #[inline]
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            Self::F32 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::Bf16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = widen(u16::from_le_bytes([b[0], b[1]]));
                }
            }
        }
    }
}

/// The bits of `bf16::from_f32`, to nearest even and NaN quiet, without a branch: every row of every
/// exchange goes through this, and only so do compilers make vector instructions of it.
#[inline]
fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    (if is_nan { quiet } else { nearest }) as u16
}

/// The value of `bf16::to_f32`, likewise.
#[inline]
fn widen(bits: u16) -> f32 {
    let quiet = if bits & 0x7fff > 0x7f80 { 0x40 } else { 0 };
    f32::from_bits(u32::from(bits | quiet) << 16)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounding_and_widening_give_the_bits_of_bf16() {
        for high in 0..=u16::MAX {
            let value = bf16::from_bits(high);
            assert_eq!(widen(high).to_bits(), value.to_f32().to_bits(), "{high:#x}");
            // Below, at and above the middle between two values, and next to both.
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let bits = value.to_bits();
                assert_eq!(round(value), bf16::from_f32(value).to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_twice_changes_nothing() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 1e3).collect();
        let mut once = Vec::new();
        Dtype::Bf16.encode(&values, &mut once);
        let mut back = vec![0.0; values.len()];
        Dtype::Bf16.decode(&once, &mut back);
        let mut twice = Vec::new();
        Dtype::Bf16.encode(&back, &mut twice);
        assert_eq!(once, twice);
    }
}
