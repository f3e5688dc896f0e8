//! Serves vision-language models over HTTP as OpenAI's chat completions, with a routing for each request.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use reroute_serve::{Server, Settings};
//! use reroute_zoo::Vlm;
//! use tokio::net::TcpListener;
//!
//! async fn serve<B: burn::tensor::backend::Backend>(
//!     vlm: Arc<Vlm<B>>,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let server = Server::new(vec![("mine".into(), vlm)], Settings::default())?;
//!     let listener = TcpListener::bind("127.0.0.1:8000").await?;
//!     Ok(server.run(listener, std::future::pending()).await?)
//! }
//! ```
//!
//! Every model has a [`Service`](reroute_zoo::session::Service): one running batch, which requests join and leave,
//! with its caches of pictures and prompts. Bodies are read, and pictures decoded, by a few threads at a time;
//! nothing waits in the threads of the runtime. `docs/serving.md` says what requests may have.

mod answer;
mod app;
mod chat;
mod check;
mod fetch;
mod limits;
mod map;
mod metrics;
mod models;
mod page;
mod pictures;
mod refusal;
mod request;
mod server;
mod stream;

pub use check::check;
pub use fetch::{Network, PublicNetwork};
pub use limits::Limits;
pub use server::{ServeError, Server, Settings};
