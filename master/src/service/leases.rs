//! The gRPC service `Leases`: one stream for each session that leases, between the wire and the desk.

use crate::coordinator::Heard;
use crate::lease::{Answer, Desk, Line};
use crate::raft::Node;
use efc_common::id::{Incarnation, SessionId};
use efc_common::task::TaskGroup;
use efc_common::{Error, Kind, Result};
use efc_proto::control::LeaseAsk;
use efc_proto::control::leases_server::{Leases, LeasesServer};
use efc_proto::lease::{LIST_MAX, MESSAGE_BYTES_MAX, Up, up_from_wire};
use efc_proto::status::{from_status, to_status};
use futures::stream::BoxStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

/// For the first word of a stream.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Room in a stream's queue that must be free before its session is heard: what it asks for is answered into that queue.
const ROOM: usize = LIST_MAX;

/// Server side of the leases.
pub(crate) struct LeaseDoor {
    node: Arc<Node>,
    desk: Arc<Desk>,
    heard: Arc<Heard>,
    tasks: TaskGroup,
}

impl LeaseDoor {
    /// The service, to mount on a gRPC server.
    pub(crate) fn service(node: Arc<Node>, desk: Arc<Desk>, heard: Arc<Heard>, tasks: TaskGroup) -> LeasesServer<Self> {
        LeasesServer::new(LeaseDoor { node, desk, heard, tasks }).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    async fn enter(&self, asks: &mut Streaming<LeaseAsk>) -> Result<(SessionId, Incarnation)> {
        self.node.lead()?;
        let first = timeout(HELLO_DEADLINE, asks.message()).await;
        let first = first.map_err(|_| Error::new(Kind::Timeout, "nobody spoke on a new stream"))?;
        let first = first.map_err(|s| from_status(&s))?;
        let Some(Up::Hello { session, incarnation }) = first.map(up_from_wire).transpose()? else {
            return Err(Error::new(Kind::Invalid, "a stream begins with who speaks"));
        };
        self.node.read(|s| match s.sessions().get(&session) {
            None => Err(Error::new(Kind::NotFound, format!("session {session} is not open; open a new one"))),
            Some(x) if x.incarnation != incarnation => {
                Err(Error::new(Kind::Stale, format!("session {session} is in life {}", x.incarnation)))
            }
            Some(x) if x.lease_ms == 0 => Err(Error::new(Kind::Invalid, "the session was not opened for leases")),
            Some(_) => Ok((session, incarnation)),
        })
    }
}

#[tonic::async_trait]
impl Leases for LeaseDoor {
    type TalkStream = BoxStream<'static, Answer>;

    async fn talk(&self, r: Request<Streaming<LeaseAsk>>) -> std::result::Result<Response<Self::TalkStream>, Status> {
        let mut asks = r.into_inner();
        let entered = match self.enter(&mut asks).await {
            Ok((session, incarnation)) => self.desk.connect(session, incarnation),
            Err(e) => Err(e),
        };
        let (line, mut answers) = entered.map_err(|e| to_status(&e))?;
        let (desk, heard) = (self.desk.clone(), self.heard.clone());
        self.tasks.spawn(async move {
            if let Err(e) = listen(&desk, &heard, &line, asks).await {
                tracing::debug!(session = %line.session, error = %e, "a stream of leases ends");
                if let Some(out) = line.out.upgrade() {
                    let _ = out.try_send(Err(to_status(&e)));
                }
            }
            desk.disconnect(&line);
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |cx| answers.poll_recv(cx)))))
    }
}

/// Hears a session until it stops speaking.
async fn listen(desk: &Desk, heard: &Heard, line: &Line, mut asks: Streaming<LeaseAsk>) -> Result<()> {
    let silence = desk.welcome()?.lease;
    let slow = |_| Error::new(Kind::Timeout, "silent, or does not read");
    loop {
        let Some(out) = line.out.upgrade() else { return Ok(()) };
        let room = timeout(silence, out.reserve_many(ROOM)).await.map_err(slow)?;
        if room.is_err() {
            return Ok(());
        }
        drop(room);
        drop(out);
        let next = timeout(silence, asks.message()).await.map_err(slow)?;
        let Some(message) = next.map_err(|s| from_status(&s))? else { return Ok(()) };
        let up = up_from_wire(message)?;
        if matches!(up, Up::Renew { .. }) {
            heard.session(line.session, line.incarnation);
        }
        desk.hear(line, up)?;
    }
}
