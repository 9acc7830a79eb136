//! Goal: programs written for OpenAI's API work unchanged. Method: the vendor's own client, from
//! the environment that `cargo xtask test` sets up in `target/clients`.

use std::path::Path;
use std::process::Command;

use entente_tests::Cluster;

#[test]
fn the_openai_python_client_works() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join("target/clients/bin/python");
    assert!(python.exists(), "there is no {}; run `cargo xtask setup`", python.display());
    let cluster = Cluster::start(&[]);
    let script = root.join("tests/clients/openai_client.py");
    let end = Command::new(python)
        .arg(script)
        .args([cluster.http(), cluster.api_key().unwrap()])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&end.stderr);
    assert!(end.status.success() && end.stdout == b"ok\n", "{told}");
}
