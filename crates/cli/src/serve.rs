//! `reroute serve`: answers over HTTP.

use std::env;
use std::io::{Write, stderr};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use reroute_serve::{Limits, Network, PublicNetwork, Server, Settings};
use reroute_zoo::session::MemoryLimit;
use reroute_zoo::{Vlm, embedded};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::args::{ModelArgs, ServeArgs};
use crate::backend::{self, Backend};
use crate::known::Known;
use crate::{hub, open};

/// Where the key is that requests must have, if no flag says it.
const API_KEY: &str = "REROUTE_API_KEY";
/// What requests call the built-in model.
const BUILT_IN: &str = "built-in";

/// Runs the command.
pub fn run(args: &ServeArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let adapters = args.model.adapter.iter().map(|adapter| named(adapter));
    let adapters = adapters.collect::<anyhow::Result<Vec<_>>>()?;
    // Each is a model of its own, not a change of this one.
    let model = ModelArgs {
        adapter: Vec::new(),
        merge_adapter: false,
        ..args.model.clone()
    };
    let known = Known::of(&model)?;
    let routing = &args.routing.routing;
    let plan = known.plan(routing)?;
    let set = env::var(API_KEY).ok().filter(|key| !key.is_empty());
    let api_key = args.api_key.clone().or(set);
    let mut settings = Settings {
        limits: Limits::from(&args.limits),
        memory: None,
        cache_bytes: args.cache,
        apart: args.apart,
        layers_per_step: args.layers_per_step,
        routing: (routing.clone(), plan),
        api_key,
        hosts: { args.allow_host.iter() }
            .map(|name| name.to_lowercase())
            .collect(),
        cors: args.cors.clone(),
        network: { args.allow_fetch }.then(|| Arc::new(PublicNetwork) as Arc<dyn Network>),
        folders: args.allow_dir.clone(),
        grace: Duration::from_secs(args.grace),
        example: args.model.model.is_none().then_some(embedded::SCENE.image),
    };
    if !args.host.is_loopback() && settings.api_key.is_none() {
        let _ = writeln!(
            stderr(),
            "note: everybody who reaches {} may ask; {API_KEY} sets a key",
            args.host
        );
    }
    let address = SocketAddr::new(args.host, args.port);
    let runtime = Runtime::new().context("cannot start threads")?;
    // What is taken is known before the weights are read.
    let listener = runtime.block_on(TcpListener::bind(address));
    let listener = listener.with_context(|| format!("cannot listen at {address}"))?;
    let vlm = Arc::new(open::model(&model)?);
    settings.memory = args.memory.map(|bytes| MemoryLimit {
        bytes,
        arithmetic: Some(backend::numbers(vlm.dtype())),
    });
    let mut models = vec![(name(args), vlm.clone())];
    for (name, folder) in adapters {
        models.push((
            name,
            Arc::new(adapted(&vlm, &folder, args.model.merge_adapter)?),
        ));
    }
    let server = Server::new(models, settings)?;
    runtime.block_on(async {
        let shutdown = shutdown()?;
        writeln!(out, "listening at http://{}", listener.local_addr()?)?;
        out.flush()?;
        anyhow::Ok(server.run(listener, shutdown).await?)
    })
}

/// `NAME=DIR`
fn named(adapter: &Path) -> anyhow::Result<(String, PathBuf)> {
    let pair = adapter.to_str().and_then(|text| text.split_once('='));
    let pair = pair.filter(|(name, folder)| !name.is_empty() && !folder.is_empty());
    let (name, folder) = pair.ok_or_else(|| {
        let shown = adapter.display();
        anyhow!("--adapter {shown} is not NAME=DIR: say what requests call the model with it")
    })?;
    Ok((name.into(), folder.into()))
}

/// The model with an adapter; the weights are shared, unless it is added to them.
fn adapted(vlm: &Vlm<Backend>, folder: &Path, merge: bool) -> anyhow::Result<Vlm<Backend>> {
    let model = vlm.model();
    ensure!(
        !merge || model.coded().is_empty(),
        "--merge-adapter adds the adapter to the weights, which are in codes of fewer bits here: leave it out"
    );
    let model = model.load_adapter(&hub::folder(folder, None)?)?;
    Ok(vlm.with_model(match merge {
        true => model.merge_adapters(),
        false => model,
    }))
}

/// What requests call the model.
fn name(args: &ServeArgs) -> String {
    let path = args.model.model.as_deref();
    let folder = path.map(|path| path.canonicalize().unwrap_or(path.to_owned()));
    let folder = folder.as_deref().and_then(Path::file_name);
    let folder = folder.map(|name| name.to_string_lossy().into_owned());
    let name = args.name.clone().or(folder);
    name.unwrap_or_else(|| BUILT_IN.into())
}

/// Waits until the program is told to end. Told again, it ends at once.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let mut told = told()?;
    Ok(async move {
        told.recv().await;
        let _ = writeln!(
            stderr(),
            "ending when running answers have; once more ends at once"
        );
        tokio::spawn(async move {
            told.recv().await;
            std::process::exit(1);
        });
    })
}

/// The signals that end programs.
struct Told {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
fn told() -> anyhow::Result<Told> {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = signal(SignalKind::terminate()).context("cannot listen to signals")?;
    Ok(Told { terminate })
}

#[cfg(not(unix))]
fn told() -> anyhow::Result<Told> {
    Ok(Told {})
}

impl Told {
    #[cfg(unix)]
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    }

    #[cfg(not(unix))]
    async fn recv(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
