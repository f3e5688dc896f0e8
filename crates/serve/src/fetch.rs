//! Pictures from the network: from public addresses alone, whatever names and redirects lead to.

use std::fmt::Debug;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Error};

/// Most redirects.
const REDIRECTS: u32 = 5;
/// Longest header of an answer.
const HEADER_BYTES: usize = 64 << 10;
/// Most addresses of a name that are tried.
const ADDRESSES: usize = 16;

/// What names lead to, and which addresses pictures are fetched from.
pub trait Network: Debug + Send + Sync {
    /// The addresses of a host and port (`example.com:443`).
    ///
    /// # Errors
    /// The name is not known, or nobody answers.
    fn look_up(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        Ok(host.to_socket_addrs()?.collect())
    }

    /// Whether pictures are fetched from an address.
    fn is_open(&self, address: IpAddr) -> bool {
        is_public(address)
    }
}

/// The network as this machine sees it, of which public addresses are open.
#[derive(Debug, Clone, Copy, Default)]
pub struct PublicNetwork;

impl Network for PublicNetwork {}

/// Fetches pictures.
#[derive(Debug, Clone)]
pub(crate) struct Fetch {
    agent: Agent,
    most_bytes: usize,
}

/// Asks for the addresses of a name once, for each redirect anew, and checks all of them. What it returns is what is
/// connected to: a name that leads elsewhere a moment later does not matter.
#[derive(Debug)]
struct Checked(Arc<dyn Network>);

impl Fetch {
    pub(crate) fn new(network: Arc<dyn Network>, most_bytes: usize, time: Duration) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(time))
            .max_redirects(REDIRECTS)
            .max_response_header_size(HEADER_BYTES)
            // A connection that is kept would be used again without a look at its address.
            .max_idle_connections(0)
            // Another machine would look up names, and see others than this one.
            .proxy(None)
            .user_agent(concat!("reroute/", env!("CARGO_PKG_VERSION")))
            .accept("image/png, image/jpeg, image/webp");
        let connector = DefaultConnector::default();
        Self {
            agent: Agent::with_parts(config.build(), connector, Checked(network)),
            most_bytes,
        }
    }

    /// The bytes behind a URL, or why there are none, for whoever asked.
    pub(crate) fn get(&self, url: &str) -> Result<Vec<u8>, String> {
        let answer = self.agent.get(url).call();
        let mut answer = answer.map_err(|error| self.reason(&error))?;
        let body = answer.body_mut().with_config();
        let body = body.limit(self.most_bytes as u64);
        body.read_to_vec().map_err(|error| self.reason(&error))
    }

    fn reason(&self, error: &Error) -> String {
        match error {
            Error::StatusCode(status) => format!("it cannot be fetched: it answers {status}"),
            Error::Io(error) if error.kind() == ErrorKind::PermissionDenied => {
                "it is not fetched: it leads to an address that is not public".into()
            }
            Error::BodyExceedsLimit(_) => {
                format!(
                    "it is larger than {} bytes: give a smaller one",
                    self.most_bytes
                )
            }
            Error::Timeout(_) => "it cannot be fetched: its server is too slow".into(),
            Error::TooManyRedirects => "it cannot be fetched: it redirects too often".into(),
            Error::BadUri(_) => "it is no http or https URL".into(),
            // What else there is to say would tell of this machine's network.
            _ => "it cannot be fetched: there is no good answer from its server".into(),
        }
    }
}

impl Resolver for Checked {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(Error::HostNotFound);
        };
        let host = DefaultResolver::host_and_port(scheme, authority);
        let found = self.0.look_up(&host.ok_or(Error::HostNotFound)?)?;
        if found.iter().any(|address| !self.0.is_open(address.ip())) {
            return Err(Error::Io(ErrorKind::PermissionDenied.into()));
        }
        let mut addresses = self.empty();
        for address in found.into_iter().take(ADDRESSES) {
            addresses.push(address);
        }
        match addresses.is_empty() {
            true => Err(Error::HostNotFound),
            false => Ok(addresses),
        }
    }
}

/// Whether an address is of the public internet, by IANA's registries of special-purpose addresses.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(address) => is_public_v4(address),
            None => is_public_v6(address),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let is_special = match (a, b, c) {
        // This host, private networks, loopback.
        (0 | 10 | 127, ..) | (192, 168, _) | (172, 16..=31, _) => true,
        // Shared by providers, link-local (where clouds tell of themselves), between networks for tests.
        (100, 64..=127, _) | (169, 254, _) | (198, 18 | 19, _) => true,
        // Of protocols, for documentation, relays of IPv6.
        (192, 0, 0 | 2) | (198, 51, 100) | (203, 0, 113) | (192, 88, 99) => true,
        // Multicast, reserved, broadcast.
        (224..=255, ..) => true,
        _ => false,
    };
    // Azure tells virtual machines of themselves there.
    !is_special && address != Ipv4Addr::new(168, 63, 129, 16)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    // All else is local, multicast, or leads to IPv4 by a translator.
    let is_global = a & 0xe000 == 0x2000;
    let is_special = match a {
        // Of protocols (Teredo among them), for documentation.
        0x2001 => b < 0x200 || b == 0xdb8,
        // 6to4.
        0x2002 => true,
        0x3fff => b < 0x1000,
        _ => false,
    };
    is_global && !is_special
}

#[cfg(test)]
mod tests {
    use super::is_public;

    #[test]
    fn only_public_addresses_are() {
        for public in [
            "1.1.1.1",
            "93.184.216.34",
            "172.32.0.1",
            "2606:4700::1111",
            "::ffff:8.8.8.8",
        ] {
            assert!(is_public(public.parse().expect("an address")), "{public}");
        }
        for other in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
        ] {
            assert!(!is_public(other.parse().expect("an address")), "{other}");
        }
    }
}
