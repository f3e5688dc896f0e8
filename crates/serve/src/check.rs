//! What a server says to a body before any model sees it.

use crate::limits::{Budget, Limits};
use crate::pictures::{Room, Sources};
use crate::refusal::Refusal;
use crate::request::Chat;

/// Reads a body as a server with these limits does, and says what that would say: nothing if it asked the model, else a
/// status and the JSON of the error. Whether there is such a model, and whether it takes the routing and the numbers, is
/// for the model to say. Pictures in the body are decoded; none comes from a file or from the network. For fuzzing, and
/// for gateways that refuse early.
///
/// ```
/// use reroute_serve::{Limits, check};
///
/// let body = br#"{"messages": [{"role": "user", "content": "hello"}], "n": "one"}"#;
/// let (status, error) = check(body, &Limits::default()).expect_err("n is a number");
/// assert!(status == 400 && error.contains(r#""param":"n""#), "{error}");
/// ```
///
/// # Errors
/// The status and the error.
pub fn check(body: &[u8], limits: &Limits) -> Result<(), (u16, String)> {
    read(body, limits).map_err(|refusal| (refusal.status.as_u16(), refusal.json().to_string()))
}

fn read(body: &[u8], limits: &Limits) -> Result<(), Refusal> {
    let chat = Chat::parse(body, limits)?;
    let sources = Sources::new(None, &[]).map_err(Refusal::internal)?;
    let inbox = Budget::new(limits.inbox_bytes);
    let mut room = Room::new(limits, &inbox);
    for picture in chat.pictures() {
        sources.check(picture)?;
        sources.open(picture, None, &mut room)?;
    }
    Ok(())
}
