//! A TLS connection that can be ended from outside and that knows who is at the other end.

use crate::admission::PeerKey;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// The bytes of one link. Cancelling its token makes every read and write fail, which ends whatever runs on it.
pub(crate) struct LinkIo<S> {
    stream: S,
    peer: PeerKey,
    /// Bytes that were read ahead and are to be read again.
    ahead: Vec<u8>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    end: CancellationToken,
    /// Whatever shall live exactly as long as the connection.
    _companion: Box<dyn Send + Sync>,
}

impl<S> LinkIo<S> {
    pub(crate) fn new(
        stream: S,
        peer: PeerKey,
        ahead: Vec<u8>,
        end: CancellationToken,
        companion: impl Send + Sync + 'static,
    ) -> Self {
        let ended = Box::pin(end.clone().cancelled_owned());
        Self { stream, peer, ahead, ended, end, _companion: Box::new(companion) }
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "this node ended the connection")
}

impl<S: AsyncRead + Unpin> AsyncRead for LinkIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(ended()));
        }
        if !self.ahead.is_empty() {
            let count = buffer.remaining().min(self.ahead.len());
            buffer.put_slice(&self.ahead[..count]);
            self.ahead.drain(..count);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LinkIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.end.is_cancelled() {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.end.is_cancelled() {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.end.is_cancelled() {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.end.is_cancelled() {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }
}

impl<S> Connected for LinkIo<S> {
    type ConnectInfo = PeerKey;

    fn connect_info(&self) -> PeerKey {
        self.peer
    }
}
