//! The phrasebook model and its held-out set, inside the binary.
//!
//! A first run must need nothing but the binary, so the small model travels in it. It is written
//! out as an ordinary checkpoint folder, because that is the only form the loaders know.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Name of the model, and of its folder.
pub const NAME: &str = "phrasebook";

/// A line that the model answers, for the first sign of life of a new cluster.
pub const PROMPT: &str = "Translate to Swedish: vingt-trois";

/// Expressions that the model never saw in training, as JSON lines.
pub const HELDOUT: &str = include_str!("../../model/phrasebook/heldout.jsonl");

macro_rules! checkpoint {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_bytes!(concat!("../../model/phrasebook/checkpoint/", $name)))),+]
    };
}

const FILES: [(&str, &[u8]); 6] = checkpoint![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
];

/// Writes the checkpoint to `<models>/phrasebook`, unless the very same files are there already.
pub fn unpack(models: &Path) -> anyhow::Result<PathBuf> {
    let folder = models.join(NAME);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if fs::read(&path).is_ok_and(|present| present == bytes) {
            continue;
        }
        // A rename is atomic: an interrupted write never leaves half a file under the real name.
        let part = folder.join(format!("{name}.part"));
        fs::write(&part, bytes)
            .and_then(|()| fs::rename(&part, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_repairs_a_damaged_copy() {
        let dir = tempfile::tempdir().unwrap();
        let folder = unpack(dir.path()).unwrap();
        fs::write(folder.join("config.json"), "{").unwrap();
        fs::remove_file(folder.join("tokenizer.json")).unwrap();
        unpack(dir.path()).unwrap();
        for (name, bytes) in FILES {
            assert_eq!(fs::read(folder.join(name)).unwrap(), bytes, "{name}");
        }
    }
}
