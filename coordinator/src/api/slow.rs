//! Ends a body that comes too slowly: whoever dribbles bytes would otherwise hold a connection, and
//! what of the body is there already, for as long as they like.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use futures::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};

use super::Api;

/// The same request, whose body fails when it takes too long.
pub(super) async fn bound(State(api): State<Arc<Api>>, request: Request) -> Request {
    within(request, api.body_wait_max)
}

fn within(request: Request, longest: Duration) -> Request {
    let end = Instant::now() + longest;
    request.map(|body| {
        Body::from_stream(stream::unfold(body.into_data_stream(), move |mut pieces| async move {
            let piece = match timeout_at(end, pieces.next()).await {
                Ok(piece) => piece?.map_err(io::Error::other),
                Err(late) => Err(late.into()),
            };
            Some((piece, pieces))
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(
        pieces: impl stream::Stream<Item = io::Result<&'static str>> + Send + 'static,
    ) -> Option<String> {
        let request = within(Request::new(Body::from_stream(pieces)), Duration::from_millis(50));
        let bytes = axum::body::to_bytes(request.into_body(), 100).await.ok()?;
        String::from_utf8(bytes.to_vec()).ok()
    }

    #[tokio::test]
    async fn a_body_is_read_to_its_end_unless_it_never_comes() {
        let pieces = || stream::iter([Ok("a"), Ok("b")]);
        assert_eq!(read(pieces()).await.as_deref(), Some("ab"));
        assert_eq!(read(pieces().chain(stream::pending())).await, None);
        let broken = stream::iter([Ok("a"), Err(io::Error::other("gone"))]);
        assert_eq!(read(broken).await, None);
    }
}
