use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use reroute_serve::Limits;

use super::{ModelArgs, RoutingArgs, one_or_more};

/// Longest time limit: 30 days.
const MAX_SECONDS: u64 = 30 * 24 * 3600;

/// What is served, to whom, and how much of it.
#[derive(Debug, clap::Args)]
#[command(mut_arg("adapter", |arg| arg
    .value_name("NAME=DIR")
    .help("Folder of a low-rank adapter, as PEFT saves it, that is served as a model NAME of its own, beside the \
           model without it; may be given several times, and all share the weights")
    .long_help(None)
))]
pub struct ServeArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What requests call the model; the name of its folder otherwise.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Routing of requests that ask for none.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Address to listen at.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,
    /// Port to listen at; 0 is any that is free.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Key that requests must have (Authorization: Bearer KEY). Others on this machine see flags: better set
    /// REROUTE_API_KEY.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Name that requests may call the server by, beside localhost and its addresses, where there is no key; may be
    /// given several times.
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// Origin whose pages may ask (`https://example.com`), or * for all; may be given several times.
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
    /// Fetch pictures that are http or https URLs, from public addresses alone.
    #[arg(long)]
    pub allow_fetch: bool,
    /// Folder below which pictures that are file URLs are read; may be given several times.
    #[arg(long, value_name = "DIR")]
    pub allow_dir: Vec<PathBuf>,
    /// What is taken at most.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Bytes of weights, keys and values, caches and what is computed, together; any without it.
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<u64>,
    /// Bytes of pictures that are kept for requests to come, and as many of prompts.
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    pub cache: u64,
    /// Compute every answer as if it were alone, bit for bit; the weights are read once for each.
    #[arg(long)]
    pub apart: bool,
    /// Layers of a prompt that run between two tokens of running answers: few let these flow, many let new ones
    /// begin; a quarter of the decoder's without it.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub layers_per_step: Option<usize>,
    /// Seconds for answers that run when the server is told to end (SIGTERM, SIGINT).
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub grace: u64,
}

/// What is taken at most, of one request and of all together.
#[derive(Debug, clap::Args)]
pub struct LimitArgs {
    /// Bytes of the body of a request.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().body_bytes)]
    pub max_body: usize,
    /// Bytes of text in a request.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().text_bytes)]
    pub max_text: usize,
    /// Pictures in a request, frames of videos among them.
    #[arg(long, value_name = "N", default_value_t = Limits::default().pictures)]
    pub max_pictures: usize,
    /// Pixels of all pictures of a request together, as they come.
    #[arg(long, value_name = "N", default_value_t = Limits::default().pixels)]
    pub max_picture_pixels: u64,
    /// Tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = Limits::default().tokens, value_parser = one_or_more)]
    pub max_tokens: usize,
    /// Answers to one request.
    #[arg(long, value_name = "N", default_value_t = Limits::default().choices, value_parser = one_or_more)]
    pub max_choices: usize,
    /// Seconds from a request to the end of its answer.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().time.as_secs(), value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS))]
    pub time_limit: u64,
    /// Requests that wait while all running answers are taken; a further one is turned away (429).
    #[arg(long, value_name = "N", default_value_t = Limits::default().queue)]
    pub max_queue: usize,
    /// Answers of a model that are generated side by side.
    #[arg(long, value_name = "N", default_value_t = Limits::default().answers, value_parser = one_or_more)]
    pub max_running: usize,
    /// Bytes of bodies and decoded pictures of all requests under way.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().inbox_bytes)]
    pub max_inbox: u64,
    /// Requests that are read and preprocessed at the same time.
    #[arg(long, value_name = "N", default_value_t = Limits::default().workers, value_parser = one_or_more)]
    pub workers: usize,
    /// Pictures that are fetched at the same time.
    #[arg(long, value_name = "N", default_value_t = Limits::default().fetches, value_parser = one_or_more)]
    pub max_fetches: usize,
    /// Open connections; further ones wait.
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections, value_parser = one_or_more)]
    pub max_connections: usize,
}

impl From<&LimitArgs> for Limits {
    fn from(args: &LimitArgs) -> Self {
        Self {
            body_bytes: args.max_body,
            text_bytes: args.max_text,
            pictures: args.max_pictures,
            pixels: args.max_picture_pixels,
            tokens: args.max_tokens,
            choices: args.max_choices,
            time: Duration::from_secs(args.time_limit),
            queue: args.max_queue,
            answers: args.max_running,
            inbox_bytes: args.max_inbox,
            workers: args.workers,
            fetches: args.max_fetches,
            connections: args.max_connections,
            ..Limits::default()
        }
    }
}

/// An address, or the one that `localhost` is.
fn host(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        _ => {
            { text.parse() }.map_err(|_| "give an IP address, such as 127.0.0.1 or 0.0.0.0".into())
        }
    }
}
