//! Who may ask: a coordinator in a cluster that has agreed on tenants.

use entente_membership::client::Client;
use entente_membership::state::{Command, Expect, RecordKind};
use entente_membership::tenant::key::Seed;
use entente_membership::tenant::{Key, Scope, Secret, Tenant};

use crate::setup::*;

/// A tenant of `fr` with one key, made from `byte`.
pub fn tenant(name: &str, byte: u8, scopes: &[Scope]) -> (Tenant, Secret) {
    let seed = Seed { id: [byte; 8], secret: [byte; 32].into(), salt: [byte; 32] };
    let (key, secret) = Key::mint(&seed, 0, scopes.iter().copied().collect(), String::new());
    let mut tenant = Tenant::new(name.parse().unwrap(), ["fr".parse().unwrap()].into());
    tenant.add(key, 0).unwrap();
    (tenant, secret)
}

/// Commits a tenant as it is to be from now on.
pub async fn put(operator: &Client, tenant: &Tenant) {
    let (key, value) = (tenant.name.to_string(), tenant.encode());
    let command = Command::PutRecord { kind: RecordKind::Tenant, key, value, revision: None };
    operator.propose(PATIENCE, Expect::default(), command).await.unwrap();
}

/// Asks for the models with a key, or for a completion with a body that would be refused for other
/// reasons too.
async fn ask(running: &Running, what: &str, key: Option<&Secret>, body: &str) -> String {
    let key =
        key.map_or(String::new(), |key| format!("authorization: Bearer {}\r\n", key.reveal()));
    let len = body.len();
    let request = format!(
        "{what} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{key}content-length: {len}\r\n\r\n{body}"
    );
    running.ask(request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_the_api_from_its_commit_to_its_revocation() {
    let lonely = Lonely::new(1);
    let mut config = lonely.config("mixtral");
    config.api.open = false;
    let running = lonely.run_with(config);
    let operator = lonely.operator();
    let models = "GET /v1/models";
    let (mut tenant, secret) = tenant("tax-office", 1, &Scope::ALL);

    let refused = ask(&running, models, Some(&secret), "").await;
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    assert!(refused.to_lowercase().contains("\r\nwww-authenticate: bearer\r\n"), "{refused}");
    let body = refused.split_once("\r\n\r\n").unwrap().1;
    let error: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(error["error"]["code"], "invalid_api_key");
    assert_eq!(error["error"]["type"], "invalid_request_error");
    // Nobody hears what is wrong with a body before it is clear who sent it, however long it is.
    let post = "POST /v1/completions";
    for body in ["{", &"x".repeat(1 << 19)] {
        let refused = ask(&running, post, None, body).await;
        assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    }
    assert!(running.get("/livez").await.starts_with("HTTP/1.1 200"), "health is for everybody");

    put(&operator, &tenant).await;
    let answer = ask(&running, models, Some(&secret), "").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let malformed = ask(&running, post, Some(&secret), "{").await;
    assert!(malformed.starts_with("HTTP/1.1 400"), "{malformed}");

    tenant.keys[0].scopes = [Scope::Receipts].into();
    put(&operator, &tenant).await;
    let body = r#"{"prompt": "a"}"#;
    let refused = ask(&running, post, Some(&secret), body).await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    assert!(refused.contains("insufficient_scope"), "{refused}");

    tenant.keys[0].revoked = true;
    put(&operator, &tenant).await;
    let refused = ask(&running, models, Some(&secret), "").await;
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    running.stop().await.unwrap();
}

/// Asks for a completion of so many tokens of a prompt that is the same for all.
async fn complete(running: &Running, key: &Secret, max_tokens: u32) -> String {
    let prompt: Vec<u32> = (0..40).map(|i| 3 + i).collect();
    let body = serde_json::json!({
        "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0,
    });
    ask(running, "POST /v1/completions", Some(key), &body.to_string()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_prefix_is_reused_by_its_own_tenant_and_by_no_other() {
    let lonely = Lonely::new(1);
    let mut config = lonely.config("mixtral");
    config.api.open = false;
    let running = lonely.run_with(config);
    let _node = lonely.join("fr-expert-1");
    let operator = lonely.operator();
    let [(one, first), (other, second)] =
        [("one", 1), ("other", 2)].map(|(name, byte)| tenant(name, byte, &Scope::ALL));
    put(&operator, &one).await;
    put(&operator, &other).await;
    running.ready().await;
    let mut answers = Vec::new();
    for key in [&first, &second, &first, &second] {
        let answer = complete(&running, key, 1).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        answers.push(serde_json::from_str::<serde_json::Value>(body).unwrap()["choices"].take());
    }
    // Each took over its own: two full blocks of 16 before the last token, which is always computed.
    // The engine tells a step's figures after the step's answers.
    let reused = async || running.metric("entente_prefix_rows_reused_total").await;
    let told = async {
        while reused().await < 64 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("nothing was reused");
    assert_eq!(reused().await, 64);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_is_told_with_429_and_refilled_by_what_was_not_generated() {
    let lonely = Lonely::new(1);
    let mut config = lonely.config("mixtral");
    config.api.open = false;
    let running = lonely.run_with(config);
    let _node = lonely.join("fr-expert-1");
    let (mut tenant, secret) = tenant("tax-office", 1, &Scope::ALL);
    // So few a minute that none flows in while the test runs.
    tenant.tokens_per_minute = Some(100);
    tenant.concurrent_max = Some(1);
    put(&lonely.operator(), &tenant).await;
    running.ready().await;
    let answer = complete(&running, &secret, 2).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for header in ["limit-tokens: 100", "remaining-tokens: 5", "limit-requests: 1"] {
        assert!(answer.contains(&format!("\r\nx-ratelimit-{header}")), "{header}: {answer}");
    }
    // 40 and 40 are more than the 58 that are left. To be refused costs nothing.
    let refused = complete(&running, &secret, 40).await;
    assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(refused.contains("\r\nretry-after: "), "{refused}");
    assert!(refused.contains("rate_limit_exceeded"), "{refused}");
    let answer = complete(&running, &secret, 1).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_without_keys_is_refused_where_others_could_reach_it() {
    let lonely = Lonely::new(1);
    let mut config = lonely.config("mixtral");
    config.http = "0.0.0.0:0".to_owned();
    let never = std::future::pending();
    let run = entente_coordinator::run(config, None, None, |_, _| {}, |_| {}, never);
    let error = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("api.open") && error.contains("loopback"), "{error}");
}
