//! Quotas around the [`meter`](super::meter): a clock, a lock, and what clients are told.
//!
//! A quota holds at each coordinator by itself: requests are counted where they come in, and nothing
//! is agreed on for each. A tenant that uses the coordinators of two regions has its quota at both.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::ApiError;
use super::meter::{Exceeded, Left, Limits, Meter, Need};

/// One tenant's meter. Clones share it.
#[derive(Clone)]
pub struct Quota(Arc<Inner>);

struct Inner {
    began: Instant,
    meter: Mutex<Meter>,
}

impl Quota {
    /// A full one.
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { began: Instant::now(), meter: Mutex::new(Meter::new(limits, 0)) }))
    }

    /// Goes on with other limits.
    pub fn set_limits(&self, limits: Limits) {
        let now_ms = self.now_ms();
        self.meter().set_limits(limits, now_ms);
    }

    /// Sets aside what a request may need at most: the tokens of its prompts, and `max_tokens` for
    /// each of its answers. The request runs for as long as the grant is there.
    ///
    /// # Errors
    /// 429, saying when to come again.
    pub fn reserve(
        &self,
        prompt: usize,
        max_tokens: usize,
        answers: u32,
    ) -> Result<Grant, ApiError> {
        let (prompt, generated_max) = (prompt as u64, max_tokens as u64 * u64::from(answers));
        let reserved = Need { tokens: prompt.saturating_add(generated_max), answers };
        let now_ms = self.now_ms();
        self.meter().enter(reserved, now_ms).map_err(refuse)?;
        Ok(Grant { quota: self.clone(), reserved, prompt, used: AtomicU64::new(prompt) })
    }

    /// The headers that tell how much is left; none where nothing is limited.
    pub fn headers(&self) -> HeaderMap {
        let now_ms = self.now_ms();
        headers(self.meter().left(now_ms))
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.0.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// What was set aside for one request. Dropping it ends the request and gives back the rest.
pub struct Grant {
    quota: Quota,
    reserved: Need,
    prompt: u64,
    used: AtomicU64,
}

impl Grant {
    /// Tokens were generated.
    pub fn count(&self, tokens: u64) {
        self.used.fetch_add(tokens, Ordering::Relaxed);
    }

    /// The server could not do what was asked: a prompt to which nothing was answered costs nothing.
    pub fn forgive(&self) {
        // Where something was generated the prompt has been of use.
        let order = Ordering::Relaxed;
        let _ = self.used.compare_exchange(self.prompt, 0, order, order);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let now_ms = self.quota.now_ms();
        let tokens = self.reserved.tokens.saturating_sub(*self.used.get_mut());
        let unused = Need { tokens, ..self.reserved };
        self.quota.meter().leave(unused, now_ms);
    }
}

fn refuse(exceeded: Exceeded) -> ApiError {
    match exceeded {
        Exceeded::Requests { .. } | Exceeded::Answers { .. } => too_many(exceeded.to_string()),
        Exceeded::Tokens { retry_ms, .. } => {
            too_much("tokens", exceeded.to_string(), retry_ms.div_ceil(1_000).max(1))
        }
    }
}

/// 429: the tenant has too many requests here. When one of them ends nobody knows.
pub(super) fn too_many(message: String) -> ApiError {
    too_much("requests", message, 1)
}

fn too_much(kind: &'static str, message: String, retry_s: u64) -> ApiError {
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, kind, message, None)
        .coded("rate_limit_exceeded")
        .with_header(header::RETRY_AFTER, HeaderValue::from(retry_s))
}

/// OpenAI's names. Its requests are those of a minute; here they are those that run at once.
fn headers(left: Left) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut put = |name: &'static str, value: HeaderValue| {
        headers.insert(HeaderName::from_static(name), value);
    };
    if let Some(limit) = left.limits.tokens_per_minute {
        put("x-ratelimit-limit-tokens", limit.into());
        put("x-ratelimit-remaining-tokens", left.tokens.into());
        let reset = format!("{}s", left.full_in_ms.div_ceil(1_000));
        // Digits and a letter are a valid value.
        put("x-ratelimit-reset-tokens", reset.parse().unwrap_or(HeaderValue::from_static("60s")));
    }
    if let Some(limit) = left.limits.concurrent_max {
        put("x-ratelimit-limit-requests", limit.into());
        put("x-ratelimit-remaining-requests", left.requests.into());
    }
    headers
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    fn quota(tokens_per_minute: u64, concurrent_max: u32) -> Quota {
        let (tokens, concurrent) = (Some(tokens_per_minute), Some(concurrent_max));
        Quota::new(Limits {
            tokens_per_minute: tokens,
            concurrent_max: concurrent,
            answers_max: None,
        })
    }

    fn remaining(quota: &Quota) -> String {
        let headers = quota.headers();
        let of = |what: &str| headers[format!("x-ratelimit-remaining-{what}").as_str()].clone();
        format!("{:?} {:?}", of("tokens"), of("requests"))
    }

    #[test]
    fn a_grant_gives_back_what_was_not_generated_when_the_request_ends() {
        let quota = quota(1_000_000, 2);
        let grant = quota.reserve(100_000, 500_000, 1).unwrap();
        assert_eq!(remaining(&quota), r#""400000" "1""#);
        grant.count(150_000);
        drop(grant);
        // A few more may have flowed in meanwhile, less than a second's worth.
        let after = quota.headers()["x-ratelimit-remaining-tokens"].clone();
        let after: u64 = after.to_str().unwrap().parse().unwrap();
        assert!((750_000..770_000).contains(&after), "{after}");
    }

    #[test]
    fn a_request_that_the_server_could_not_answer_costs_nothing() {
        for (generated, forgiven) in [(0, true), (1, false)] {
            let quota = quota(600, 1);
            let grant = quota.reserve(500, 100, 1).unwrap();
            grant.count(generated);
            grant.forgive();
            drop(grant);
            let full = quota.headers()["x-ratelimit-remaining-tokens"] == "600";
            assert_eq!(full, forgiven, "{generated} generated");
        }
    }

    #[test]
    fn a_refusal_says_what_is_used_up_and_when_to_come_again() {
        let quota = quota(60, 1);
        let grant = quota.reserve(10, 50, 1).unwrap();
        let response = quota.reserve(1, 1, 1).err().unwrap().into_response();
        assert_eq!(
            (response.status(), &response.headers()["retry-after"]),
            (StatusCode::TOO_MANY_REQUESTS, &"1".parse().unwrap())
        );
        grant.count(50);
        drop(grant);
        let error = quota.reserve(10, 10, 1).err().unwrap();
        assert!(error.body().contains(r#""type":"tokens""#), "{}", error.body());
        assert!(error.body().contains("rate_limit_exceeded"), "{}", error.body());
        let retry_s = error.into_response().headers()["retry-after"].clone();
        let retry_s: u64 = retry_s.to_str().unwrap().parse().unwrap();
        assert!((19..=20).contains(&retry_s), "{retry_s}");
    }

    #[test]
    fn who_has_no_limit_is_told_of_none() {
        let quota = Quota::new(Limits::default());
        let _grants: Vec<_> = (0..100).map(|_| quota.reserve(1, 1, 1).unwrap()).collect();
        assert!(quota.headers().is_empty());
    }
}
