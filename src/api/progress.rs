//! Progress as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream};

use super::Api;
use super::views::BackupResponse;

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(500);

/// Tells the backup whenever it has changed, until it has ended.
pub(super) fn follow(api: Api, id: String) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let first = (api, id, None::<String>, false);
    let events = stream::unfold(first, |(api, id, before, ended)| async move {
        if ended {
            return None;
        }
        let mut first = before.is_none();
        loop {
            if !std::mem::take(&mut first) {
                tokio::time::sleep(EVERY).await;
            }
            let wanted = id.clone();
            let found = api
                .blocking(move |backups| {
                    let backup = backups.backup(&wanted)?;
                    Ok((BackupResponse::new(backups, &backup), backup.state.is_running()))
                })
                .await;
            let Ok((view, running)) = found else { return None };
            let text = serde_json::to_string(&view).unwrap_or_default();
            if before.as_ref() != Some(&text) || !running {
                let event = Event::default().event("progress").data(&text);
                return Some((Ok(event), (api, id, Some(text), !running)));
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}
