//! A packed file, open, and its parts on their way into memory.
//!
//! Invariants: a part is read by one thread, piece by piece, each piece hashed while it is still in
//! the cache; only the calling thread is told of progress and gets parts; the first error ends
//! everything. However many parts there are, no more memory is taken than they have bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use entente_proto::ids::{ExpertId, LayerId, ModelDigest};
use entente_proto::placement::ExpertKey;

use super::WEIGHTS_FILE;
use super::manifest::Manifest;
use super::parts::{self, Part, Restore};
use super::table::{self, Entry, Table};
use crate::ModelError;
use crate::checkpoint::digest_of_architecture;
use crate::config::Architecture;
use crate::kernels::{DeviceError, ExpertKernels, GatedFfn, Line, Lines, WeightFormat};
use crate::weights::{CoordinatorWeights, Progress};

/// Bytes that are read and then hashed at a time: they stay in the second-level cache.
const PIECE_BYTES: usize = 256 << 10;

/// Most threads that read at once; memory is the limit long before.
const READERS_MAX: usize = 16;

/// An open packed file whose table has been checked. Its parts are on disk.
pub(crate) struct Packed {
    path: PathBuf,
    file: File,
    table: Table,
    table_blake3: [u8; 32],
}

impl Packed {
    /// Opens the packed weights of a folder, if it has any.
    pub fn open(dir: &Path, arch: &Architecture) -> Result<Option<Self>, ModelError> {
        let path = dir.join(WEIGHTS_FILE);
        let io = |error| ModelError::io(&path, error);
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io)?,
        };
        let file_len = file.metadata().map_err(io)?.len();
        let mut frame = [0; table::FRAME_BYTES];
        if file_len < table::ALIGNMENT {
            let reason = format!("truncated: {file_len} bytes hold no header");
            return Err(ModelError::file(&path, reason));
        }
        file.read_exact_at(&mut frame, 0).map_err(io)?;
        let (range, checksum) = table::parse_frame(&path, &frame, file_len)?;
        // The range lies in the file and its length is bounded.
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).map_err(io)?;
        if blake3::hash(&bytes) != checksum {
            let reason = "differs from its checksum; import again";
            return Err(ModelError::field(&path, "table", reason));
        }
        let digest = digest_of_architecture(arch);
        let table = Table::parse(&path, &bytes, range.start, arch, digest)?;
        Ok(Some(Self { path, file, table, table_blake3: checksum }))
    }

    /// Refuses a manifest that does not vouch for the checksums of this file.
    pub fn require(&self, manifest: &Manifest) -> Result<(), ModelError> {
        manifest.require_table(self.table_blake3)
    }

    /// Digest of the model that was packed.
    pub fn model_digest(&self) -> ModelDigest {
        self.table.model_digest
    }

    /// The format that was packed.
    pub fn format(&self) -> WeightFormat {
        self.table.format
    }

    /// Refuses any other format than that of the file.
    pub fn require_format(&self, format: WeightFormat) -> Result<(), ModelError> {
        let packed = self.table.format;
        if packed == format {
            return Ok(());
        }
        let (packed, wanted) = (packed.name(), format.name());
        let reason = format!("is {packed}, but {wanted} is asked for; import it as {wanted}, too");
        Err(ModelError::field(&self.path, "weights", reason))
    }

    /// Bytes of memory that an expert's matrices take.
    pub fn expert_bytes(&self, layer: LayerId, expert: ExpertId) -> u64 {
        let entry = self.table.parts.get(&Part::Expert(layer, expert));
        entry.map_or(0, |entry| parts::matrix_bytes(&entry.tensors))
    }

    /// Everything but the experts. `progress` counts parts.
    pub fn coordinator(
        &self,
        arch: &Architecture,
        progress: &dyn Progress,
    ) -> Result<CoordinatorWeights, ModelError> {
        let wanted: Vec<Part> = parts::coordinator(arch).collect();
        let mut read = BTreeMap::new();
        let take = |part, restore| {
            read.insert(part, restore);
            Ok(())
        };
        self.read_all(&wanted, progress, |restore| restore, take)?;
        let mut take = |part| read.remove(&part).expect("every part that was asked for was read");
        let embed = take(Part::Embedding).embedding();
        let (norm, head) = take(Part::Head).head();
        let layer = |layer| take(Part::Layer(layer)).layer(arch, layer);
        let layers = (0..arch.layers.len()).map(layer).collect();
        Ok(CoordinatorWeights { embed, layers, norm, head })
    }

    /// Some experts, where `kernels` multiply. `progress` counts them.
    pub fn experts(
        &self,
        arch: &Architecture,
        kernels: &dyn ExpertKernels,
        placed: &BTreeSet<ExpertKey>,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<ExpertKey, GatedFfn>, ModelError> {
        let wanted: Vec<Part> = placed.iter().map(|key| Part::Expert(key.0, key.1)).collect();
        let mut experts = BTreeMap::new();
        // By the thread that has read it: others go on reading while a device takes it.
        let make = |mut restore: Restore<'_>| restore.ffn(arch.activation).place(kernels);
        let take = |part, ffn: Result<GatedFfn, DeviceError>| {
            if let Part::Expert(layer, expert) = part {
                experts.insert((layer, expert), ffn.map_err(ModelError::Device)?);
            }
            Ok(())
        };
        self.read_all(&wanted, progress, make, take)?;
        Ok(experts)
    }

    /// The manifest of what the file holds, each part of which is compared with its checksum.
    /// `progress` counts them.
    pub fn manifest(&self, dir: &Path, progress: &dyn Progress) -> Result<Manifest, ModelError> {
        let all: Vec<Part> = self.table.parts.keys().copied().collect();
        let mut hashes = BTreeMap::new();
        self.read_all(
            &all,
            progress,
            |restore| restore.sha256(),
            |part, hash| {
                hashes.insert(part, hash);
                Ok(())
            },
        )?;
        Ok(Manifest::of(dir, &self.table, &hashes))
    }

    /// Reads parts with several threads, each of which makes something of what it has read, and
    /// hands that to `take` as it comes. Parts must be the architecture's.
    fn read_all<'a, T: Send>(
        &'a self,
        wanted: &[Part],
        progress: &dyn Progress,
        make: impl Fn(Restore<'a>) -> T + Sync,
        mut take: impl FnMut(Part, T) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = cores.min(READERS_MAX).min(wanted.len());
        let next = AtomicUsize::new(0);
        let (sender, receiver) = sync_channel(READERS_MAX);
        std::thread::scope(|scope| {
            for _ in 0..readers {
                let (sender, next, make) = (sender.clone(), &next, &make);
                scope.spawn(move || {
                    while let Some(part) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                        // Nobody listens any more once another part has failed.
                        if sender.send((*part, self.read(*part).map(make))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (done, (part, read)) in (1..).zip(receiver) {
                take(part, read?)?;
                progress.advance(done, wanted.len() as u64);
            }
            Ok(())
        })
    }

    /// Reads one part and compares it with its checksum.
    fn read(&self, part: Part) -> Result<Restore<'_>, ModelError> {
        let Some(Entry { offset, len, checksum, tensors }) = self.table.parts.get(&part) else {
            return Err(ModelError::file(&self.path, format!("has no {part}")));
        };
        let mut lines = Lines::zeroed(len / size_of::<Line>());
        let mut hash = blake3::Hasher::new();
        let mut place = *offset;
        for piece in lines.as_bytes_mut().chunks_mut(PIECE_BYTES) {
            self.file.read_exact_at(piece, place).map_err(|e| ModelError::io(&self.path, e))?;
            hash.update(piece);
            place += piece.len() as u64;
        }
        if hash.finalize() != *checksum {
            let field = format!("{part}: bytes {offset}..{place}");
            let reason = "differ from their checksum; import again";
            return Err(ModelError::field(&self.path, &field, reason));
        }
        Ok(Restore::new(lines, tensors))
    }
}
