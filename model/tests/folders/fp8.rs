//! A checkpoint that is stored in FP8 is the model that its codes and scales say, without loss where the
//! kernels keep them, and refused by name where they cannot be what they seem.

use entente_model::kernels::{self, Kernels, Matrix, WeightFormat};
use entente_model::synth::{self, Shape};
use entente_model::{Checkpoint, CoordinatorWeights, load_expert, packed};
use entente_proto::ids::{ExpertId, LayerId};
use serde_json::json;

use crate::folder::{Folder, Tensor, Tensors};

/// Several blocks of 128 in every direction, whole and not; gate and up meet within one when fused.
const SHAPE: Shape = Shape {
    hidden: 192,
    inner: 320,
    layers: 2,
    heads: 2,
    kv_heads: 1,
    experts: 2,
    top_k: 1,
    vocab: 1_024,
};

/// What one scale is for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    Blocks,
    Matrices,
}

fn made() -> Folder {
    let folder = Folder::empty();
    synth::write(folder.path(), &SHAPE, 7, &|_, _| {}).unwrap();
    folder
}

/// The number of a code: sign, exponent with a bias of 7, three bits of fraction.
fn number(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let magnitude =
        if exponent == 0 { fraction / 64.0 } else { (1.0 + fraction) * 2_f32.powi(exponent - 7) };
    if code < 0x80 { magnitude } else { -magnitude }
}

/// Codes and scales of some shape, and the weights that they stand for, in f32.
fn draw(shape: &[usize], cut: Cut) -> [Tensor; 3] {
    let (inputs, outputs) = (shape[shape.len() - 1], shape[shape.len() - 2]);
    let matrices: usize = shape[..shape.len() - 2].iter().product();
    let [rows, columns] = match cut {
        Cut::Blocks => [outputs.div_ceil(128), inputs.div_ceil(128)],
        Cut::Matrices => [1, 1],
    };
    let mut state = (outputs * inputs) as u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as u32
    };
    let scales: Vec<f32> =
        (0..matrices * rows * columns).map(|_| (random() as f32 + 1e6) * 1e-12).collect();
    // All codes but NaN.
    let codes: Vec<u8> = (0..matrices * outputs * inputs)
        .map(|_| (random() % 127 + random() % 2 * 128) as u8)
        .collect();
    let value = |at: usize| {
        let (matrix, output, input) = (at / (outputs * inputs), at / inputs % outputs, at % inputs);
        let [row, column] = match cut {
            Cut::Blocks => [output / 128, input / 128],
            Cut::Matrices => [0, 0],
        };
        number(codes[at]) * scales[(matrix * rows + row) * columns + column]
    };
    let values = (0..codes.len()).flat_map(|at| value(at).to_le_bytes()).collect();
    let leading = &shape[..shape.len() - 2];
    let tensor =
        |dtype: &str, shape: Vec<usize>, data| Tensor { dtype: dtype.to_owned(), shape, data };
    let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    [
        tensor("F8_E4M3", shape.to_vec(), codes.clone()),
        tensor("F32", [leading, &[rows, columns]].concat(), scales),
        tensor("F32", shape.to_vec(), values),
    ]
}

fn is_quantised(name: &str) -> bool {
    name.contains("self_attn") || name.contains("experts")
}

/// A folder in FP8, and one with the same weights in f32.
fn twins(cut: Cut, fused: bool) -> [Folder; 2] {
    let twins = [made(), made()];
    let mut stored: [Tensors; 2] = twins.each_ref().map(|folder| {
        if fused {
            folder.fuse_experts(SHAPE.layers, SHAPE.experts);
        }
        folder.tensors()
    });
    let names: Vec<String> = stored[0].keys().filter(|name| is_quantised(name)).cloned().collect();
    for name in names {
        let [codes, mut scales, values] = draw(&stored[0][&name].shape, cut);
        if name.ends_with("q_proj.weight") && cut == Cut::Matrices {
            scales.shape = Vec::new();
        }
        stored[0].insert(name.clone(), codes);
        // Both endings are found in the wild.
        let ending = if cut == Cut::Blocks { "_scale_inv" } else { "_scale" };
        stored[0].insert(format!("{name}{ending}"), scales);
        stored[1].insert(name, values);
    }
    for (folder, tensors) in twins.iter().zip(&stored) {
        folder.write_tensors("model.safetensors", tensors);
    }
    let block = if cut == Cut::Blocks { json!([128, 128]) } else { json!(null) };
    let scheme = json!({
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block,
    });
    twins[0].configure("quantization_config", scheme);
    twins
}

/// What every matrix that was drawn makes of a row that bf16 can hold.
fn products(checkpoint: &Checkpoint, kernels: &dyn Kernels) -> Vec<Vec<f32>> {
    let weights = CoordinatorWeights::load(checkpoint, kernels, &()).unwrap();
    let mut products = Vec::new();
    let mut multiply = |matrix: &Matrix| {
        let x: Vec<f32> =
            (0..matrix.in_features()).map(|i| (i * 37 % 256) as f32 / 128.0 - 1.0).collect();
        let mut y = vec![f32::NAN; matrix.out_features()];
        kernels.matmul(&x, matrix, &mut y);
        products.push(y);
    };
    for (layer, held) in weights.layers.iter().enumerate() {
        [&held.q, &held.k, &held.v, &held.o].into_iter().for_each(&mut multiply);
        for expert in 0..SHAPE.experts {
            let (layer, expert) = (LayerId(layer as u16), ExpertId(expert as u16));
            let ffn = load_expert(checkpoint, kernels, layer, expert).unwrap();
            [&ffn.gate, &ffn.up, &ffn.down].into_iter().for_each(&mut multiply);
        }
    }
    products
}

fn bits(products: &[Vec<f32>]) -> Vec<Vec<u32>> {
    products.iter().map(|y| y.iter().map(|v| v.to_bits()).collect()).collect()
}

fn for_all_forms(mut check: impl FnMut([&Checkpoint; 2])) {
    for (cut, fused) in
        [(Cut::Blocks, false), (Cut::Blocks, true), (Cut::Matrices, false), (Cut::Matrices, true)]
    {
        let twins = twins(cut, fused);
        let [stored, widened] = twins.each_ref().map(|twin| Checkpoint::open(twin.path()).unwrap());
        check([&stored, &widened]);
    }
}

#[test]
fn codes_and_scales_are_kept_without_loss() {
    let (fp8, exact) =
        [WeightFormat::Fp8, WeightFormat::F32].map(|f| kernels::select(f, 1).unwrap()).into();
    for_all_forms(|[stored, widened]| {
        let (have, want) = (products(stored, &*fp8), products(widened, &*exact));
        for (have, want) in have.iter().zip(&want) {
            let scale = want.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
            for (have, want) in have.iter().zip(want) {
                // The order of additions alone; rounding weights to e4m3 again would cost 1e-2.
                assert!((have - want).abs() <= 2e-6 * scale, "{have} for {want}, of {scale}");
            }
        }
    });
}

#[test]
fn other_formats_hold_what_they_would_of_the_widened_weights() {
    for_all_forms(|twins| {
        for format in WeightFormat::ALL.into_iter().filter(|f| *f != WeightFormat::Fp8) {
            let kernels = kernels::select(format, 1).unwrap();
            let [have, want] = twins.map(|twin| bits(&products(twin, &*kernels)));
            assert!(have == want, "{format:?}");
        }
    });
}

#[test]
fn an_import_multiplies_to_the_same_bits() {
    let kernels = kernels::select(WeightFormat::Fp8, 2).unwrap();
    let [stored, _] = twins(Cut::Blocks, true);
    let stored = Checkpoint::open(stored.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("packed");
    packed::import(&stored, &*kernels, &out, &()).unwrap();
    let imported = Checkpoint::open(&out).unwrap();
    assert_eq!(packed::format(&imported), Some(WeightFormat::Fp8));
    assert_eq!(imported.digest(), stored.digest());
    assert_eq!(bits(&products(&imported, &*kernels)), bits(&products(&stored, &*kernels)));
}

#[test]
fn scales_that_do_not_fit_are_refused_by_name() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    const SCALES: &str = "model.layers.1.self_attn.q_proj.weight_scale_inv";
    type Case = (fn(&mut Tensors), [&'static str; 2]);
    let cases: [Case; 7] = [
        (|t| drop(t.remove(SCALES)), [Q, "F8_E4M3 without"]),
        (|t| t.get_mut(SCALES).unwrap().shape = vec![4, 1], [SCALES, "[4, 1], expected"]),
        (|t| t.get_mut(SCALES).unwrap().dtype = "I32".to_owned(), [SCALES, "dtype I32"]),
        (|t| t.get_mut(Q).unwrap().dtype = "F8_E5M2".to_owned(), [Q, "dtype F8_E5M2"]),
        (
            |t| {
                let second = t[SCALES].clone();
                t.insert(SCALES.replace("_inv", ""), second);
            },
            ["q_proj.weight_scale:", "not part of"],
        ),
        (
            |t| {
                let scales = t[SCALES].clone();
                t.insert("lm_head.weight_scale".to_owned(), scales);
            },
            ["lm_head.weight_scale", "not part of"],
        ),
        (
            |t| {
                let [codes, scales, _] = draw(&[SHAPE.vocab, SHAPE.hidden], Cut::Blocks);
                t.insert("model.embed_tokens.weight".to_owned(), codes);
                t.insert("model.embed_tokens.weight_scale".to_owned(), scales);
            },
            ["model.embed_tokens.weight", "not for norms, gates and embeddings"],
        ),
    ];
    for (spoil, words) in cases {
        let [folder, _] = twins(Cut::Blocks, false);
        folder.edit_tensors(spoil);
        let error = Checkpoint::open(folder.path()).map(drop).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error} lacks one of {words:?}");
    }
}
