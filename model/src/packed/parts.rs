//! Which parts the weights of an architecture have, which tensors each part, and in which order.
//!
//! The order of tensors is written down once for each direction, side by side: `pieces` takes
//! weights apart, `restore` puts them together. What is restored has been compared with
//! [`Part::tensors`] when the file was opened.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use entente_proto::ids::{ExpertId, LayerId};
use sha2::{Digest, Sha256};

use super::table::{Encoding, Stored};
use crate::config::{Architecture, FfnSpec};
use crate::kernels::{
    Activation, GatedFfn, Layout, Line, Lines, Matrix, SourceDtype, WeightFormat,
};
use crate::weights::{CoordinatorWeights, Embedding, FfnWeights, LayerWeights};

/// What is read at once. In a file they follow one another in the order of this type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Token ids to rows.
    Embedding,
    /// The last norm, and rows to logits.
    Head,
    /// What a coordinator holds of a layer.
    Layer(usize),
    /// One expert.
    Expert(LayerId, ExpertId),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => write!(f, "embedding"),
            Self::Head => write!(f, "head"),
            Self::Layer(layer) => write!(f, "layer {layer}"),
            Self::Expert(layer, expert) => write!(f, "expert {expert} of layer {layer}"),
        }
    }
}

/// What a tensor is for, which decides how it may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// A norm, in f32.
    Norm,
    /// Rows that are looked up.
    Lookup,
    /// A matrix in the weight format.
    Matrix,
    /// A matrix that multiplies in f32 whatever the weight format.
    Gate,
}

/// All parts, in order.
pub(crate) fn all(arch: &Architecture) -> impl Iterator<Item = Part> + '_ {
    let experts = arch
        .moe_layers()
        .flat_map(|(layer, count)| (0..count).map(move |e| Part::Expert(layer, ExpertId(e))));
    coordinator(arch).chain(experts)
}

/// The parts of a coordinator, in order.
pub(crate) fn coordinator(arch: &Architecture) -> impl Iterator<Item = Part> + use<> {
    [Part::Embedding, Part::Head].into_iter().chain((0..arch.layers.len()).map(Part::Layer))
}

impl Part {
    /// Its tensors in order, with `[rows, columns]`. The part must be one of the architecture's.
    pub fn tensors(self, arch: &Architecture) -> Vec<(Use, [usize; 2])> {
        let hidden = arch.hidden;
        let norm = (Use::Norm, [1, hidden]);
        let gated = |inner| [[inner, hidden], [inner, hidden], [hidden, inner]];
        match self {
            Self::Embedding => vec![(Use::Lookup, [arch.vocab, hidden])],
            Self::Head => vec![norm, (Use::Matrix, [arch.vocab, hidden])],
            Self::Layer(layer) => {
                let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
                let attention = [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q]];
                let mut list = vec![norm];
                list.extend(attention.map(|shape| (Use::Matrix, shape)));
                list.push(norm);
                match arch.layers[layer].ffn {
                    FfnSpec::Moe { experts, .. } => list.push((Use::Gate, [experts, hidden])),
                    FfnSpec::Dense { inner } => {
                        list.extend(gated(inner).map(|shape| (Use::Matrix, shape)));
                    }
                }
                list
            }
            Self::Expert(layer, _) => {
                let inner = arch.mixture(layer).map_or(0, |(_, inner)| inner);
                gated(inner).map(|shape| (Use::Matrix, shape)).into()
            }
        }
    }
}

/// One tensor on its way into a file.
pub(crate) struct Piece<'a> {
    pub encoding: Encoding,
    pub shape: [usize; 2],
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> From<&'a Matrix> for Piece<'a> {
    fn from(matrix: &'a Matrix) -> Self {
        Self {
            encoding: Encoding::Panels(matrix.layout()),
            shape: [matrix.out_features(), matrix.in_features()],
            // What is packed into a file, and what a coordinator holds, is never placed on a device.
            bytes: matrix.host_bytes().expect("packed by a processor").into(),
        }
    }
}

impl From<&Vec<f32>> for Piece<'_> {
    fn from(norm: &Vec<f32>) -> Self {
        let bytes = norm.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { encoding: Encoding::NORM, shape: [1, norm.len()], bytes: Cow::Owned(bytes) }
    }
}

impl<'a> From<&'a Embedding> for Piece<'a> {
    fn from(table: &'a Embedding) -> Self {
        let (dtype, shape, bytes) = table.rows();
        Self { encoding: Encoding::Rows(dtype), shape, bytes: bytes.into() }
    }
}

/// The tensors of one of the coordinator's parts.
pub(crate) fn pieces(weights: &CoordinatorWeights, part: Part) -> Vec<Piece<'_>> {
    match part {
        Part::Embedding => vec![(&weights.embed).into()],
        Part::Head => vec![(&weights.norm).into(), (&weights.head).into()],
        Part::Layer(layer) => {
            let LayerWeights { input_norm, q, k, v, o, post_norm, ffn } = &weights.layers[layer];
            let mut list = vec![input_norm.into()];
            list.extend([q, k, v, o].map(Piece::from));
            list.push(post_norm.into());
            match ffn {
                FfnWeights::Dense(ffn) => list.extend(pieces_of_ffn(ffn)),
                FfnWeights::Moe { gate } => list.push(gate.into()),
            }
            list
        }
        Part::Expert(..) => unreachable!("a coordinator holds no experts"),
    }
}

/// The tensors of an expert or of a dense layer's feed-forward.
pub(crate) fn pieces_of_ffn(ffn: &GatedFfn) -> [Piece<'_>; 3] {
    [&ffn.gate, &ffn.up, &ffn.down].map(Piece::from)
}

/// A part in memory, whose tensors are taken one after the other.
pub(crate) struct Restore<'a> {
    lines: Arc<Lines>,
    tensors: std::slice::Iter<'a, Stored>,
}

impl<'a> Restore<'a> {
    /// `lines` hold `tensors`, which are those of the part that is restored.
    pub fn new(lines: Lines, tensors: &'a [Stored]) -> Self {
        Self { lines: Arc::new(lines), tensors: tensors.iter() }
    }

    /// SHA-256 of the part.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.lines.as_bytes()).into()
    }

    fn next(&mut self) -> &'a Stored {
        self.tensors.next().expect("a part has the tensors that its architecture calls for")
    }

    fn norm(&mut self) -> Vec<f32> {
        let range = self.next().range.clone();
        let bytes = &self.lines.as_bytes()[range];
        bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    }

    fn matrix(&mut self) -> Matrix {
        let Stored { encoding, shape, range } = self.next();
        let Encoding::Panels(layout) = *encoding else {
            unreachable!("a matrix is stored as panels, which was seen when the file was opened")
        };
        Matrix::packed(*shape, layout, self.lines.clone(), range.start / size_of::<Line>())
    }

    pub fn embedding(mut self) -> Embedding {
        let Stored { encoding, shape, range } = self.next();
        let Encoding::Rows(dtype) = *encoding else {
            unreachable!("a table is stored as rows, which was seen when the file was opened")
        };
        Embedding::new(self.lines, range.len(), shape[1], dtype)
    }

    pub fn head(mut self) -> (Vec<f32>, Matrix) {
        (self.norm(), self.matrix())
    }

    pub fn ffn(&mut self, activation: Activation) -> GatedFfn {
        // Fields are evaluated in the order in which they are written here.
        GatedFfn { gate: self.matrix(), up: self.matrix(), down: self.matrix(), activation }
    }

    pub fn layer(mut self, arch: &Architecture, layer: usize) -> LayerWeights {
        LayerWeights {
            input_norm: self.norm(),
            q: self.matrix(),
            k: self.matrix(),
            v: self.matrix(),
            o: self.matrix(),
            post_norm: self.norm(),
            ffn: match arch.layers[layer].ffn {
                FfnSpec::Dense { .. } => FfnWeights::Dense(self.ffn(arch.activation)),
                FfnSpec::Moe { .. } => FfnWeights::Moe { gate: self.matrix() },
            },
        }
    }
}

/// Bytes of memory that an expert's matrices take.
pub(crate) fn matrix_bytes(tensors: &[Stored]) -> u64 {
    tensors.iter().map(|tensor| tensor.range.len() as u64).sum()
}

/// Whether a tensor for `what` may be stored like this in a file of the format.
pub(crate) fn allowed(what: Use, encoding: Encoding, format: WeightFormat) -> bool {
    let of = |format, layout| {
        [SourceDtype::F32, SourceDtype::Bf16].iter().any(|d| Layout::of(format, *d) == layout)
    };
    match (what, encoding) {
        (Use::Norm, encoding) => encoding == Encoding::NORM,
        (Use::Lookup, Encoding::Rows(_)) => true,
        (Use::Matrix, Encoding::Panels(layout)) => of(format, layout),
        (Use::Gate, Encoding::Panels(layout)) => of(WeightFormat::F32, layout),
        _ => false,
    }
}
