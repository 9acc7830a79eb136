//! A real etcd, as the operator would run it, but for where it listens.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use entente_membership::mirror::Config;
use etcd_client::{Client, GetOptions, WatchOptions, WatchStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

/// An etcd of its own, gone with the value.
pub struct Etcd {
    process: Child,
    endpoint: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Ports that were free a moment ago; nobody else on this machine starts etcd now.
        let port =
            || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().map(|address| address.port());
        let (client, peer) = (port().unwrap(), port().unwrap());
        let (endpoint, peer) =
            (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let process = Command::new("etcd")
            .args(["--data-dir", dir.path().to_str().unwrap(), "--log-level", "error"])
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed by `cargo xtask setup`");
        let etcd = Self { process, endpoint, _dir: dir };
        etcd.answers().await;
        etcd
    }

    /// Waits until it answers. It has no other way to say so.
    async fn answers(&self) {
        let asked = async {
            loop {
                let client = self.client().await;
                if let Ok(mut client) = client
                    && client.get("any", None).await.is_ok()
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, asked).await.expect("etcd answers");
    }

    async fn client(&self) -> Result<Client, etcd_client::Error> {
        Client::connect([&self.endpoint], None).await
    }

    pub fn config(&self) -> Config {
        let (endpoints, prefix) = (vec![self.endpoint.clone()], "/entente".to_owned());
        Config { endpoints, prefix, tls: None }
    }

    /// Everything under a prefix, from the beginning.
    pub async fn watch(&self, root: &str) -> WatchStream {
        let options = WatchOptions::new().with_prefix().with_start_revision(1);
        self.client().await.unwrap().watch(root, Some(options)).await.unwrap()
    }

    pub async fn all(&self, root: &str) -> BTreeMap<String, String> {
        let options = GetOptions::new().with_prefix();
        let answer = self.client().await.unwrap().get(root, Some(options)).await.unwrap();
        let pair = |pair: &etcd_client::KeyValue| {
            (pair.key_str().unwrap().to_owned(), pair.value_str().unwrap().to_owned())
        };
        answer.kvs().iter().map(pair).collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
