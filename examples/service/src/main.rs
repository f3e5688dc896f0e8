//! A server that answers a line with a stream of text, and clients that ask it all at once.
//!
//! A request is one line: a routing, a space, a question about the built-in picture. Every connection has a
//! thread; all of them ask one session, which generates their answers side by side.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use reroute_zoo::backend::Flex;
use reroute_zoo::session::{Event, Request, Service, SessionOptions, Turn};
use reroute_zoo::{DecodeLimits, OpenOptions, Visual, Vlm, decode, embedded};

type Failure = Box<dyn Error + Send + Sync>;

/// What every connection has in common.
struct Shared {
    vlm: Arc<Vlm<Flex>>,
    service: Service<Flex>,
    picture: Arc<Visual>,
}

impl Shared {
    fn open() -> Result<Self, Failure> {
        let folder = embedded::checkpoint();
        let vlm = Vlm::open(&folder, &OpenOptions::default(), &Default::default())?;
        let vlm = Arc::new(vlm);
        let picture = decode(embedded::SCENE.image, &DecodeLimits::default())?;
        Ok(Self {
            service: Service::start(vlm.clone(), SessionOptions::default())?,
            picture: Arc::new(Visual::Image(picture)),
            vlm,
        })
    }

    /// Answers one line, piece by piece.
    fn answer(&self, line: &str, to: &mut impl Write) -> Result<(), Failure> {
        let (routing, text) = line.split_once(' ').ok_or("ROUTING QUESTION, please")?;
        let plan = self.vlm.plan(routing)?;
        let turn = Turn::user([self.picture.clone().into(), text.into()]);
        let request = Request::new(vec![turn], plan, self.vlm.generation_defaults());
        // Whoever hangs up drops the iterator, and that cancels the request.
        for event in self.service.ask(request) {
            match event {
                Event::Token { text, .. } => to.write_all(text.as_bytes())?,
                Event::Failed { error, .. } => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn serve(&self, mut connection: TcpStream) -> Result<(), Failure> {
        let mut line = String::new();
        BufReader::new(connection.try_clone()?.take(4096)).read_line(&mut line)?;
        match self.answer(line.trim(), &mut connection) {
            Err(error) => Ok(writeln!(connection, "error: {error}")?),
            Ok(()) => Ok(()),
        }
    }
}

fn ask(server: SocketAddr, line: &str) -> Result<String, Failure> {
    let mut connection = TcpStream::connect(server)?;
    writeln!(connection, "{line}")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

fn main() -> Result<(), Failure> {
    let shared = Shared::open()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let server = listener.local_addr()?;
    let lines: Vec<String> = ["dense", "pdrop@192", "reroute-pdrop@192", "visionzip@192"]
        .iter()
        .flat_map(|routing| {
            ["white square", "large cyan square"].map(|what| format!("{routing} find the {what}"))
        })
        .collect();
    let started = Instant::now();
    thread::scope(|scope| {
        let shared = &shared;
        let clients: Vec<_> = lines
            .iter()
            .map(|line| scope.spawn(move || ask(server, line)))
            .collect();
        for connection in listener.incoming().take(clients.len()) {
            scope.spawn(move || shared.serve(connection?));
        }
        for (line, client) in lines.iter().zip(clients) {
            let answer = client.join().map_err(|_| "a client panicked")??;
            println!("{line}: {}", answer.trim());
        }
        Ok::<(), Failure>(())
    })?;
    let (count, elapsed) = (lines.len(), started.elapsed());
    println!("{count} requests at once in {elapsed:.0?}");
    Ok(())
}
