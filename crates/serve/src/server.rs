//! Connections, and how a server comes to its end.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::backend::Backend;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use reroute_zoo::reducers::{Plan, Schedule};
use reroute_zoo::session::{MemoryLimit, SessionOptions};
use reroute_zoo::{Vlm, ZooError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use crate::app::{self, App};
use crate::fetch::{Fetch, Network};
use crate::limits::Limits;
use crate::models::Models;
use crate::pictures::Sources;

/// For the head of a request, from its first byte or from the end of the one before.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// Most bytes of a head.
const HEAD_BYTES: usize = 64 << 10;
/// For a picture on the network.
const FETCH_TIME: Duration = Duration::from_secs(10);
/// For the last bytes of answers that have ended when a server does.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// Before the next connection when there can be none.
const PAUSE: Duration = Duration::from_millis(100);

/// How a server runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What it takes at most.
    pub limits: Limits,
    /// What all running batches may take of memory, the weights included.
    pub memory: Option<MemoryLimit>,
    /// Bytes of pictures that are kept for requests to come, and as many of prompts.
    pub cache_bytes: u64,
    /// Compute every answer as if it were alone, see [`SessionOptions::apart`].
    pub apart: bool,
    /// Layers of a prompt that run between two tokens of running answers, see [`SessionOptions::layers_per_step`]; a
    /// quarter of the decoder's without it, so that a new answer begins four tokens later.
    pub layers_per_step: Option<usize>,
    /// The routing of requests that ask for none: its name, and what it is.
    pub routing: (String, Plan),
    /// Who asks for answers must have it.
    pub api_key: Option<String>,
    /// Names of this server, in small letters, beside `localhost` and its addresses; with a key it may have any.
    pub hosts: Vec<String>,
    /// Origins whose pages may ask (`https://example.com`), or `*` for all.
    pub cors: Vec<String>,
    /// Where http and https URLs of pictures are fetched from; nowhere without.
    pub network: Option<Arc<dyn Network>>,
    /// Folders below which file URLs of pictures are read.
    pub folders: Vec<PathBuf>,
    /// For answers that run when the server is to end.
    pub grace: Duration,
    /// A PNG file that the page begins with.
    pub example: Option<&'static [u8]>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            memory: None,
            cache_bytes: 256 << 20,
            apart: false,
            layers_per_step: None,
            routing: ("dense".into(), Schedule::dense().into()),
            api_key: None,
            hosts: Vec::new(),
            cors: Vec::new(),
            network: None,
            folders: Vec::new(),
            grace: Duration::from_secs(30),
            example: None,
        }
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A model cannot be asked.
    #[error(transparent)]
    Zoo(#[from] ZooError),
    /// A folder of pictures is none.
    #[error("the folders of pictures cannot be read: {0}; give folders that are there")]
    Folder(io::Error),
    /// Something that may not be.
    #[error("{0}")]
    Setting(&'static str),
}

/// Models that are asked over HTTP.
pub struct Server<B: Backend> {
    app: Arc<App<B>>,
    grace: Duration,
}

impl<B: Backend> Server<B> {
    /// Starts the running batches of models by their names, the first of which is asked where a request names none.
    /// They may share weights: [`Vlm::with_model`].
    ///
    /// # Errors
    /// [`ServeError`]
    pub fn new(models: Vec<(String, Arc<Vlm<B>>)>, settings: Settings) -> Result<Self, ServeError> {
        let ids = models.iter().map(|(id, _)| id);
        let unique: std::collections::HashSet<&String> = ids.collect();
        if unique.len() < models.len() || models.is_empty() {
            let message = "a server has one model at least, and models have names of their own";
            return Err(ServeError::Setting(message));
        }
        if settings.api_key.as_ref().is_some_and(String::is_empty) {
            return Err(ServeError::Setting("an empty API key protects nothing"));
        }
        let limits = &settings.limits;
        let options = SessionOptions {
            memory: settings.memory,
            cache_bytes: settings.cache_bytes,
            // Whoever has a place may wait.
            max_waiting: limits.places(),
            max_answers: limits.answers,
            apart: settings.apart,
            ..SessionOptions::default()
        };
        let fetch = settings.network.clone();
        let fetch = fetch.map(|network| Fetch::new(network, limits.body_bytes, FETCH_TIME));
        let sources = Sources::new(fetch, &settings.folders).map_err(ServeError::Folder)?;
        let layers = settings.layers_per_step;
        let models = Models::start(models, (&options, layers), settings.routing.clone())?;
        let grace = settings.grace;
        let app = App::new(models, sources, settings);
        let app = Arc::new(app.map_err(ServeError::Setting)?);
        Ok(Self { app, grace })
    }

    /// Answers until `shutdown` is there and all answers that run have ended, at most the grace time later. New
    /// requests are told so meanwhile (503).
    ///
    /// # Errors
    /// The runtime has no clock or no network.
    pub async fn run(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let Self { app, grace } = self;
        let router = app::router(app.clone());
        let connections = Arc::new(Semaphore::new(app.limits().connections.max(1)));
        let graceful = GracefulShutdown::new();
        let mut ended = pin!(async {
            shutdown.await;
            app.close();
            let _ = timeout(grace, app.idle()).await;
        });
        let mut server = http1::Builder::new();
        server
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_buf_size(HEAD_BYTES);
        loop {
            let (stream, place) = tokio::select! {
                connection = accept(&listener, &connections) => connection,
                () = &mut ended => break,
            };
            let service = TowerToHyperService::new(router.clone());
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(app.limits().silence));
            let connection = server.serve_connection(TokioIo::new(Box::pin(stream)), service);
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                // Who asked badly has been told; who has gone needs no answer.
                let _ = connection.await;
                drop(place);
            });
        }
        app.end();
        let _ = timeout(FLUSH_TIME, graceful.shutdown()).await;
        Ok(())
    }
}

impl<B: Backend> fmt::Debug for Server<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

/// The next connection, when there is a place for it.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let place = connections.clone().acquire_owned().await;
        match (listener.accept().await, place) {
            (Ok((stream, _)), Ok(place)) => {
                // Tokens go out one by one.
                let _ = stream.set_nodelay(true);
                return (stream, place);
            }
            // Too many open files, or a connection that is gone again.
            _ => sleep(PAUSE).await,
        }
    }
}
