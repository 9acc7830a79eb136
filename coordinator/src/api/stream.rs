//! From what the engine says to what the client reads: whole, or as server-sent events that merge
//! the answers of one request as they grow.
//!
//! The first event of every answer is awaited before the response starts, so that a request that
//! cannot be served gets a status code rather than a stream that begins with an error.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt};
use serde_json::Value;

use super::ApiError;
use super::choice::{Answer, Pending};
use crate::engine::{EngineError, Event};

/// Writes the answers of one kind of endpoint.
pub trait Format: Send + 'static {
    /// Everything at once.
    fn whole(self, answers: Vec<Answer>) -> Value;
    /// Chunks for one event of answer `index`.
    fn event(&mut self, index: usize, event: Event) -> Vec<Value>;
    /// Chunks after all answers have ended.
    fn end(&mut self) -> Vec<Value>;
}

type Source = SelectAll<stream::BoxStream<'static, (usize, Event)>>;

struct Streamer<F> {
    source: Source,
    format: F,
    /// Answers that have not ended.
    open: usize,
    queue: VecDeque<String>,
}

/// Answers with what `pending` produce, written by `format`.
pub async fn respond<F: Format>(
    mut pending: Vec<Pending>,
    format: F,
    stream: bool,
) -> Result<Response, ApiError> {
    if stream {
        return stream_of(pending, format).await;
    }
    let mut answers = Vec::with_capacity(pending.len());
    for pending in &mut pending {
        answers.push(pending.collect().await?);
    }
    Ok(Json(format.whole(answers)).into_response())
}

async fn stream_of<F: Format>(pending: Vec<Pending>, format: F) -> Result<Response, ApiError> {
    let open = pending.len();
    let mut source = Source::new();
    let mut first = Vec::new();
    for (index, mut pending) in pending.into_iter().enumerate() {
        match pending.next().await {
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(EngineError::Stopped.into()),
            Some(event) => first.push((index, event)),
        }
        let events = stream::unfold(pending, move |mut pending| async move {
            let event = pending.next().await?;
            Some(((index, event), pending))
        });
        source.push(events.boxed());
    }
    let mut streamer = Streamer { source, format, open, queue: VecDeque::new() };
    for (index, event) in first {
        streamer.take(index, event);
    }
    Ok(Sse::new(streamer.into_stream()).keep_alive(KeepAlive::default()).into_response())
}

impl<F: Format> Streamer<F> {
    fn take(&mut self, index: usize, event: Event) {
        let ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
        if let Event::Failed(error) = event {
            self.queue.push_back(ApiError::from(error).body());
        } else {
            let chunks = self.format.event(index, event);
            self.queue.extend(chunks.iter().map(Value::to_string));
        }
        self.open -= usize::from(ended);
        if self.open == 0 {
            self.queue.extend(self.format.end().iter().map(Value::to_string));
            self.queue.push_back("[DONE]".to_owned());
        }
    }

    fn into_stream(self) -> impl Stream<Item = Result<SseEvent, Infallible>> {
        stream::unfold(self, |mut streamer| async move {
            while streamer.queue.is_empty() {
                // Ends when every answer has ended, or when the engine went away in between.
                let (index, event) = streamer.source.next().await?;
                streamer.take(index, event);
            }
            let data = streamer.queue.pop_front()?;
            Some((Ok(SseEvent::default().data(data)), streamer))
        })
    }
}
