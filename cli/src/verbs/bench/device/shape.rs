//! What is measured on a device: the experts of a layer, and the rest of it.

use std::fmt;
use std::str::FromStr;

use entente_model::kernels::AttentionShape;
use serde::Serialize;

/// The experts of one layer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    pub hidden: usize,
    pub inner: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// Mixtral 8x7B and Mistral Small 4.
pub const SHAPES: [&str; 2] = ["4096x14336x8x2", "4096x2048x128x4"];

/// What a coordinator computes of a layer, and the head.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Trunk {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
}

/// Mixtral 8x7B.
pub const TRUNKS: [&str; 1] = ["4096x32x8x128x32000"];

impl Trunk {
    /// Attention to all earlier positions.
    pub fn attention(&self) -> AttentionShape {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let scale = (head_dim as f32).powf(-0.5);
        AttentionShape { heads, kv_heads, head_dim, window: None, scale }
    }

    /// Outputs of all heads of a row.
    pub fn q_len(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Outputs of all key heads, or value heads, of a row.
    pub fn kv_len(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// `N` numbers between which there is an x.
fn sides<const N: usize>(text: &str) -> Option<[usize; N]> {
    let numbers: Option<Vec<usize>> = text.split('x').map(|n| n.parse().ok()).collect();
    numbers?.try_into().ok()
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.hidden, self.inner, self.experts, self.top_k)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match sides(text) {
            Some([hidden, inner, experts, top_k])
                if (1..=65_536).contains(&hidden)
                    && (1..=1 << 20).contains(&inner)
                    && (1..=4_096).contains(&experts)
                    && (1..=experts).contains(&top_k) =>
            {
                Ok(Self { hidden, inner, experts, top_k })
            }
            _ => Err(format!("{text} is not HIDDENxINNERxEXPERTSxTOP, such as {}", SHAPES[0])),
        }
    }
}

impl fmt::Display for Trunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hidden, heads, kv_heads, head_dim, vocab } = self;
        write!(f, "{hidden}x{heads}x{kv_heads}x{head_dim}x{vocab}")
    }
}

impl FromStr for Trunk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match sides(text) {
            Some([hidden, heads, kv_heads, head_dim, vocab])
                if (1..=65_536).contains(&hidden)
                    && (1..=1_024).contains(&heads)
                    && (1..=heads).contains(&kv_heads)
                    && (1..=1_024).contains(&head_dim)
                    && (1..=1 << 20).contains(&vocab) =>
            {
                Ok(Self { hidden, heads, kv_heads, head_dim, vocab })
            }
            _ => {
                let example = TRUNKS[0];
                Err(format!(
                    "{text} is not HIDDENxHEADSxKV_HEADSxHEAD_DIMxVOCAB, such as {example}"
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_four_numbers_that_make_sense() {
        for text in SHAPES {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        for text in ["", "1x2x3", "1x2x3x4", "0x1x1x1", "1x1x1x0", "1x1x1x1x1", "ax1x1x1"] {
            assert!(text.parse::<Shape>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_trunk_is_five_numbers_that_make_sense() {
        assert_eq!(TRUNKS[0].parse::<Trunk>().unwrap().to_string(), TRUNKS[0]);
        for text in ["1x1x1x1", "1x1x2x1x1", "1x1x0x1x1", "1x2x1x1x0"] {
            assert!(text.parse::<Trunk>().is_err(), "{text:?}");
        }
    }
}
