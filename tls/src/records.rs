//! The records of a connection whose handshake is over (RFC 8446, sections 4.6.3, 5 and 6.1).
//!
//! rustls does the handshake, derives every key, and seals and opens each record. What is done here
//! is what its own connection does around that: to count records, to renew keys before they are
//! worn out, and to tell data from what TLS says about itself. It is done here because rustls'
//! connection copies each record once more on either way, and what it copies is most of what an
//! exchange carries.
//!
//! Invariants:
//! - no key seals more records than its suite allows; a number is never used twice under one key;
//! - what cannot be opened, or is none of data, alert and key update, ends the connection.

use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks,
    OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::{
    ConnectionTrafficSecrets, ContentType, ExtractedSecrets, InvalidMessage, PeerMisbehaved,
    ProtocolVersion, SupportedCipherSuite, Tls13CipherSuite,
};

use crate::Error;

/// Most plain text in a record.
const PLAIN_BYTES_MAX: usize = 16 << 10;
/// Most sealed text in a record.
const SEALED_BYTES_MAX: usize = PLAIN_BYTES_MAX + 256;
const HEADER_LEN: usize = 5;
/// Records without data that a peer may send between two with data; each costs us something.
const IDLE_RECORDS_MAX: u32 = 32;

/// The handshake message `KeyUpdate`, up to whether the peer is asked for one too.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];
const CLOSE_NOTIFY: u8 = 0;

/// See the module.
pub(crate) struct Records {
    suite: &'static Tls13CipherSuite,
    keys: Box<dyn Keys>,
    sealer: Box<dyn MessageEncrypter>,
    opener: Box<dyn MessageDecrypter>,
    /// Records under the present keys.
    sealed: u64,
    opened: u64,
    idle: u32,
    /// The peer wants new keys from us before more data.
    asked: bool,
}

/// Gives the next key of each direction.
trait Keys: Send {
    fn next_to_seal(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
    fn next_to_open(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error>;
}

impl<Data: Send> Keys for KernelConnection<Data> {
    fn next_to_seal(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        Ok(self.update_tx_secret()?.1)
    }

    fn next_to_open(&mut self) -> Result<ConnectionTrafficSecrets, rustls::Error> {
        Ok(self.update_rx_secret()?.1)
    }
}

/// What the first record in a buffer came to.
pub(crate) enum Opened<'a> {
    /// Its plain text, maybe nothing, and the bytes that it took of the buffer.
    Data(&'a [u8], usize),
    /// It has not come whole.
    Partial,
    /// The peer will send nothing more.
    Closed,
}

impl Records {
    /// Goes on where the handshake ended, before any data went either way.
    pub(crate) fn new<Data: Send + 'static>(
        secrets: ExtractedSecrets,
        keys: KernelConnection<Data>,
    ) -> Result<Self, Error> {
        let suite = match keys.negotiated_cipher_suite() {
            SupportedCipherSuite::Tls13(suite) => suite,
            // There is another one only where TLS 1.2 is compiled in, and it is never agreed on.
            #[allow(unreachable_patterns)]
            _ => return Err(rustls::Error::HandshakeNotComplete.into()),
        };
        let ((sealed, seal), (opened, open)) = (secrets.tx, secrets.rx);
        if sealed != 0 || opened != 0 {
            let text = "data came with the end of the handshake";
            return Err(rustls::Error::General(text.to_owned()).into());
        }
        Ok(Self {
            suite,
            keys: Box::new(keys),
            sealer: sealer(suite, seal)?,
            opener: opener(suite, open)?,
            sealed,
            opened,
            idle: 0,
            asked: false,
        })
    }

    /// Seals `plain` and hands each record over.
    pub(crate) fn seal(
        &mut self,
        plain: &[u8],
        mut sink: impl FnMut(Vec<u8>),
    ) -> Result<(), Error> {
        for plain in plain.chunks(PLAIN_BYTES_MAX) {
            // The last record under a key says that it is.
            if self.asked || self.sealed + 1 >= self.suite.common.confidentiality_limit {
                self.asked = false;
                let [kind, high, middle, low] = KEY_UPDATE;
                sink(self.record(ContentType::Handshake, &[kind, high, middle, low, 0])?);
                self.sealer = sealer(self.suite, self.keys.next_to_seal()?)?;
                self.sealed = 0;
            }
            sink(self.record(ContentType::ApplicationData, plain)?);
        }
        Ok(())
    }

    fn record(&mut self, typ: ContentType, plain: &[u8]) -> Result<Vec<u8>, Error> {
        let payload = OutboundChunks::Single(plain);
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let record = self.sealer.encrypt(message, self.sealed)?;
        self.sealed += 1;
        Ok(record.encode())
    }

    /// Opens the first record in `bytes`, where it lies.
    pub(crate) fn open<'a>(&mut self, bytes: &'a mut [u8]) -> Result<Opened<'a>, Error> {
        let Some((header, rest)) = bytes.split_first_chunk_mut::<HEADER_LEN>() else {
            return Ok(Opened::Partial);
        };
        let [typ, _, _, high, low] = *header;
        let len = usize::from(u16::from_be_bytes([high, low]));
        if ContentType::from(typ) != ContentType::ApplicationData {
            return Err(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType).into());
        }
        if len > SEALED_BYTES_MAX {
            return Err(rustls::Error::PeerSentOversizedRecord.into());
        }
        let Some(sealed) = rest.get_mut(..len) else { return Ok(Opened::Partial) };
        let sealed = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            sealed,
        );
        let plain = self.opener.decrypt(sealed, self.opened)?;
        self.opened += 1;
        if plain.typ == ContentType::ApplicationData && !plain.payload.is_empty() {
            self.idle = 0;
            return Ok(Opened::Data(plain.payload, HEADER_LEN + len));
        }
        let open = self.heed(plain.typ, plain.payload)?;
        Ok(if open { Opened::Data(&[], HEADER_LEN + len) } else { Opened::Closed })
    }

    /// Does what TLS itself says. False when it says that the connection ends.
    fn heed(&mut self, typ: ContentType, said: &[u8]) -> Result<bool, Error> {
        self.idle += 1;
        if self.idle > IDLE_RECORDS_MAX {
            return Err(rustls::Error::from(PeerMisbehaved::TooManyEmptyFragments).into());
        }
        match (typ, said) {
            (ContentType::ApplicationData, []) => Ok(true),
            (ContentType::Alert, [_, CLOSE_NOTIFY]) => Ok(false),
            (ContentType::Alert, [_, reason]) => {
                Err(rustls::Error::AlertReceived((*reason).into()).into())
            }
            (ContentType::Handshake, [update @ .., ask @ (0 | 1)]) if update == KEY_UPDATE => {
                self.asked |= *ask == 1;
                self.opener = opener(self.suite, self.keys.next_to_open()?)?;
                self.opened = 0;
                Ok(true)
            }
            _ => Err(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType).into()),
        }
    }
}

fn sealer(
    suite: &Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageEncrypter>, Error> {
    let (key, iv) = parts(secrets)?;
    Ok(suite.aead_alg.encrypter(key, iv))
}

fn opener(
    suite: &Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, Error> {
    let (key, iv) = parts(secrets)?;
    Ok(suite.aead_alg.decrypter(key, iv))
}

fn parts(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        // None that our provider has.
        _ => Err(rustls::Error::General("unknown secrets".to_owned()).into()),
    }
}
