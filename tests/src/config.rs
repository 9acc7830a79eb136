//! The smallest configuration of a process that a test starts by itself.

use std::fs;
use std::path::Path;

use crate::Golden;

/// Writes one for the process `name` in fr, of a cluster with one expert node and no certificates,
/// that computes the tiny Mixtral in bf16. `own` are the lines that such processes differ in. Gives
/// the file as a command line argument.
pub fn write(dir: &Path, name: &str, own: &str) -> String {
    let file = dir.join(format!("{name}.toml"));
    let text = format!(
        r#"
        name = "{name}"
        region = "fr"
        model = "{}"
        weights = "bf16"
        {own}

        [cluster]
        name = "local"
        nodes = [{{ name = "fr-expert-1", region = "fr", address = "127.0.0.1:7100" }}]
        "#,
        Golden::load("mixtral").path()
    );
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}
