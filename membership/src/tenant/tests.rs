//! Tenants and keys as they are made, shown, rotated, written and read.

use super::key::Seed;
use super::*;
use crate::state::Command;
use zeroize::Zeroizing;

const NOW_MS: u64 = 1_000_000;

fn tenant() -> Tenant {
    let allowed = ["se", "fr"].map(|code| code.parse().unwrap());
    Tenant::new("tax-office".parse().unwrap(), allowed.into())
}

fn key(byte: u8) -> (Key, Secret) {
    let seed = Seed { id: [byte; 8], secret: Zeroizing::new([byte; 32]), salt: [!byte; 32] };
    Key::mint(&seed, NOW_MS, Scope::ALL.into(), "nightly jobs".to_owned())
}

/// The same with an end.
fn ending(byte: u8, expires_ms: u64) -> Key {
    let mut key = key(byte).0;
    key.expires_ms = Some(expires_ms);
    key
}

/// Why a change was refused; a tenant has no `Debug`, as what is in it is nobody's business.
fn refusal(result: Result<(), KeyError>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn a_key_is_known_by_its_own_secret_and_by_no_other_text() {
    let ((key, secret), (other, others)) = (key(1), key(2));
    let text = secret.reveal();
    assert_eq!(text.len(), "mk_".len() + 16 + 1 + 43);
    let shown = Shown::parse(text);
    assert_eq!(shown.id, key.id.as_str());
    assert!(key.matches(&shown) && !other.matches(&shown));
    assert!(!key.matches(&Shown::parse(others.reveal())));
    let cut = &text[..text.len() - 1];
    let longer = format!("{text}A");
    let changed = format!("{cut}_");
    let upper = text.to_uppercase();
    for bad in ["", "mk_", "mk__", cut, &longer, &changed, &upper, &text[3..]] {
        assert!(!key.matches(&Shown::parse(bad)), "{bad:?} was taken");
    }
    assert!(!Key::decoy().matches(&Shown::parse("")) && !Key::decoy().is_live(0));
}

#[test]
fn secrets_have_any_of_the_characters_of_base64url_also_the_one_that_separates() {
    let seed = Seed { id: [0; 8], secret: Zeroizing::new([0xff; 32]), salt: [7; 32] };
    let (key, secret) = Key::mint(&seed, NOW_MS, Scopes::new(), String::new());
    assert!(secret.reveal().ends_with("______8"), "255s are written as underscores");
    assert!(key.matches(&Shown::parse(secret.reveal())));
}

#[test]
fn the_mac_is_what_rfc_2104_says() {
    // Computed by another implementation: HMAC-SHA-256 under 32 bytes of 7 of the 43 characters
    // that 32 bytes of 255 are in base64url.
    let seed = Seed { id: [0; 8], secret: Zeroizing::new([0xff; 32]), salt: [7; 32] };
    let (key, _) = Key::mint(&seed, NOW_MS, Scopes::new(), String::new());
    let mac: String = key.to_wire().mac.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(mac, "0938e138da670bcea227b009279f5c1f076c3de447ff612501f5a5c6c9bb02ef");
}

#[test]
fn two_keys_live_while_rotating_and_a_third_is_refused() {
    let mut tenant = tenant();
    let (first, second, third) = (key(1).0, key(2).0, key(3).0);
    tenant.add(first.clone(), NOW_MS).unwrap();
    tenant.rotate(&first.id, second.clone(), NOW_MS + 60, NOW_MS).unwrap();
    assert_eq!(tenant.live(NOW_MS + 59).count(), 2);
    let error = refusal(tenant.add(third.clone(), NOW_MS + 59));
    assert!(error.contains("has 2 live keys (0101010101010101, 0202020202020202)"), "{error}");
    // The first one's time is up, which makes room.
    tenant.rotate(&second.id, third.clone(), NOW_MS + 90, NOW_MS + 60).unwrap();
    tenant.revoke(&second.id, NOW_MS + 61).unwrap();
    let live: Vec<&KeyId> = tenant.live(NOW_MS + 62).map(|key| &key.id).collect();
    assert_eq!(live, [&third.id]);
    let error = refusal(tenant.revoke(&second.id, NOW_MS + 63));
    assert_eq!(error, "tax-office has no live key 0202020202020202");
}

#[test]
fn a_key_that_ends_sooner_anyway_is_not_given_more_time_by_its_rotation() {
    let mut tenant = tenant();
    let first = ending(1, NOW_MS + 10);
    tenant.add(first.clone(), NOW_MS).unwrap();
    tenant.rotate(&first.id, key(2).0, NOW_MS + 60, NOW_MS).unwrap();
    assert_eq!(tenant.keys[0].expires_ms, Some(NOW_MS + 10));
}

#[test]
fn a_record_remembers_so_many_keys_and_forgets_the_oldest_dead_one() {
    let mut tenant = tenant();
    for byte in 0..=u8::try_from(KEYS_MAX).unwrap() {
        let key = key(byte).0;
        let id = key.id.clone();
        tenant.add(key, NOW_MS).unwrap();
        if byte > 0 {
            tenant.revoke(&id, NOW_MS).unwrap();
        }
    }
    assert_eq!(tenant.keys.len(), KEYS_MAX);
    let ids = [&tenant.keys[0].id, &tenant.keys[1].id].map(KeyId::as_str);
    assert_eq!(ids, ["0000000000000000", "0202020202020202"], "the live one stays");
    assert!(tenant.encode().len() < crate::state::RECORD_VALUE_LEN_MAX);
}

#[test]
fn a_tenant_survives_being_written_and_read() {
    let mut tenant = tenant();
    (tenant.tokens_per_minute, tenant.concurrent_max) = (Some(0), Some(7));
    tenant.add(ending(1, 9), NOW_MS).unwrap();
    tenant.add(key(2).0, NOW_MS).unwrap();
    assert!(Tenant::decode(&tenant.encode()) == Ok(tenant));
}

#[test]
fn what_is_not_a_tenant_is_refused() {
    let good = wire::Tenant {
        name: "a".to_owned(),
        allowed: vec!["fr".to_owned(), "se".to_owned()],
        keys: vec![key(1).0.to_wire()],
        ..Default::default()
    };
    assert!(Tenant::decode(&good.encode_to_vec()).is_ok());
    type Change = fn(&mut wire::Tenant);
    let changes: [(&str, Change); 9] = [
        ("a name that is none", |t| t.name = "A b".to_owned()),
        ("a region that is none", |t| t.allowed[0] = "france".to_owned()),
        ("regions in no order", |t| t.allowed.reverse()),
        ("a region twice", |t| t.allowed[1] = "fr".to_owned()),
        ("a quota beyond bounds", |t| t.tokens_per_minute = Some(TOKENS_PER_MINUTE_MAX + 1)),
        ("a key twice", |t| t.keys.push(t.keys[0].clone())),
        ("a short salt", |t| t.keys[0].salt.truncate(31)),
        ("a scope that is none", |t| t.keys[0].scopes[0] = "everything".to_owned()),
        ("a label of several lines", |t| t.keys[0].label = "a\nb".to_owned()),
    ];
    for (what, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(Tenant::decode(&bad.encode_to_vec()).is_err(), "{what} was taken");
    }
    let many = vec![key(1).0.to_wire(); KEYS_MAX + 1];
    assert!(Tenant::decode(&wire::Tenant { keys: many, ..good }.encode_to_vec()).is_err());
}

#[test]
fn a_policy_is_hashed_in_its_canonical_form_whatever_else_the_tenant_has() {
    let mut tenant = tenant();
    let policy = tenant.policy(12);
    assert_eq!(policy.id, "tax-office@12");
    let canonical = Policy::canonical(&tenant.name, &tenant.allowed);
    assert_eq!(canonical, r#"{"allowed":["fr","se"],"tenant":"tax-office"}"#);
    // printf '{"allowed":["fr","se"],"tenant":"tax-office"}' | sha256sum
    let hex: String = policy.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "fb651135ff6ffc4fc1eb88e7865a3f68a7a90af6905ebd38316a041fe5bf4b43");
    tenant.add(key(1).0, NOW_MS).unwrap();
    assert_eq!(tenant.policy(13).sha256, policy.sha256);
    tenant.allowed.clear();
    assert_ne!(tenant.policy(14).sha256, policy.sha256);
}

#[test]
fn tenants_are_found_in_the_state_under_their_own_name_only() {
    let mut state = State::genesis(Vec::new()).unwrap();
    let put = |key: &str, tenant: &Tenant| Command::PutRecord {
        kind: RecordKind::Tenant,
        key: key.to_owned(),
        value: tenant.encode(),
        revision: Some(0),
    };
    let tenant = tenant();
    state.apply(put("tax-office", &tenant)).unwrap();
    let (found, revision) = Tenant::of(&state, &tenant.name).unwrap().unwrap();
    assert!(found == tenant && revision == state.revision());
    assert!(Tenant::of(&state, &"other".parse().unwrap()).is_none());
    state.apply(put("other", &tenant)).unwrap();
    assert!(Tenant::of(&state, &"other".parse().unwrap()).unwrap().is_err());
    let read: Vec<bool> = Tenant::all(&state).map(|tenant| tenant.is_ok()).collect();
    assert_eq!(read, [false, true]);
}
