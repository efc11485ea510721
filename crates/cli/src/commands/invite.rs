//! `mlxnode invite`: opens a window in which one node may join.

use crate::arguments::Global;
use crate::connection::Connection;
use crate::{output, wire};
use anyhow::Result;
use clap::Args;
use mlxnode_proto::v1::{InviteRequest, StatusRequest};

/// Let one more Mac in.
///
/// Prints a short code to type on the other Mac and a long token for scripts. Either works once, until it runs out; a new invite
/// replaces the one before.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode invite
  mlxnode invite --lifetime 60 --json")]
pub struct Invite {
    /// How long the invite is good for, in seconds (at most 3600).
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=3600))]
    lifetime: u32,
}

impl Invite {
    pub async fn run(self, global: &Global) -> Result<()> {
        let connection = Connection::open(global).await?;
        let request = InviteRequest { lifetime_seconds: self.lifetime };
        let invite = wire::invite(connection.cluster().invite(request).await?.into_inner());
        if global.json {
            return output::json(&invite);
        }
        output::line(&format!("On the other Mac, within {}:", span(self.lifetime)))?;
        output::line(&format!("\n  mlxnode join --invite {}\n", invite.code))?;
        // The invite is open at the coordinator, which need not be this node.
        let status = wire::status(connection.cluster().status(StatusRequest {}).await?.into_inner());
        let coordinator = status.nodes.iter().find(|node| node.id == status.coordinator.node_id);
        if let Some(coordinator) = coordinator {
            let address = &coordinator.address;
            output::line(&format!(
                "Where mDNS does not reach:\n\n  mlxnode join --invite {} --peer {address}\n",
                invite.code
            ))?;
        }
        output::line(&format!("In scripts:\n\n  mlxnode join --invite {}", invite.token))
    }
}

/// "90 seconds", "10 minutes".
fn span(seconds: u32) -> String {
    match seconds {
        1 => "1 second".to_owned(),
        60 => "1 minute".to_owned(),
        seconds if seconds % 60 == 0 => format!("{} minutes", seconds / 60),
        seconds => format!("{seconds} seconds"),
    }
}

#[cfg(test)]
mod tests {
    use super::span;

    #[test]
    fn a_span_is_never_longer_than_the_invite_lasts() {
        let told = [1, 30, 60, 90, 600].map(span);
        assert_eq!(told, ["1 second", "30 seconds", "1 minute", "90 seconds", "10 minutes"]);
    }
}
