//! The sources of the kernels, and how they become code for one kind of device.
//!
//! CUDA's compiler library, NVRTC, compiles them when a device is first opened, which
//! takes seconds; the result is kept in a folder. A file there is named after everything that it was
//! made of, and begins with the checksum of what follows. One that is damaged is not used but made
//! again, and with a file at hand no compiler is needed.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use super::device::Architecture;
use super::nvrtc;
use crate::kernels::DeviceError;

/// A source and the name by which others include it.
pub(super) struct Source {
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(Source { name: $name, text: include_str!($name) }),*]
    };
}

/// What kernels are written in terms of.
const HEADERS: &[Source] = sources![
    "decode.cuh",
    "device.cuh",
    "gemm.cuh",
    "geometry.cuh",
    "math.cuh",
    "panel.cuh",
    "prefill.cuh",
    "weights.cuh",
];

/// The kernels; together they are one program.
const KERNELS: &[Source] =
    sources!["attention.cu", "exact.cu", "ffn.cu", "logits.cu", "matmul.cu", "rows.cu"];

/// Files of compiled kernels, which may be deleted at any time.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Files in `folder`, which is made when the first is written.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder that the service manager gives (`CACHE_DIRECTORY`), or the user's
    /// (`XDG_CACHE_HOME`, `~/.cache`). Without any of them nothing is kept: a folder that everybody
    /// can write to is no place for code.
    pub fn of_user() -> Option<Self> {
        let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let folder = folder("CACHE_DIRECTORY")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("entente")))
            .or_else(|| folder("HOME").map(|home| home.join(".cache/entente")))?;
        Some(Self::in_folder(folder.join("kernels")))
    }

    /// The code in file `name`, if it is whole.
    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let file = fs::read(self.folder.join(name)).ok()?;
        let (sum, code) = file.split_at_checked(blake3::OUT_LEN)?;
        (blake3::hash(code).as_bytes() == sum).then(|| code.to_vec())
    }

    /// Keeps code. What cannot be written is compiled again next time.
    fn write(&self, name: &str, code: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        // Several processes may start at once; each puts a whole file in place.
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)?;
        file.persist(self.folder.join(name))?;
        Ok(())
    }

    /// Names of files that begin with `prefix`, the last in the order of names first.
    fn names(&self, prefix: &str) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
        names.sort_unstable_by(|a, b| b.cmp(a));
        names
    }
}

/// Code for one architecture.
pub(super) struct Image {
    code: Vec<u8>,
    origin: String,
}

impl Image {
    pub fn bytes(&self) -> &[u8] {
        &self.code
    }

    /// Where it comes from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

/// The kernels for `architecture`: from the cache, or compiled.
///
/// # Errors
/// They are not in the cache, and there is no compiler or it refuses them.
pub(super) fn kernels(
    architecture: Architecture,
    cache: Option<&Cache>,
) -> Result<Image, DeviceError> {
    let options = options(architecture);
    let prefix = format!("{architecture}-{}-", digest(&options));
    let compiler = nvrtc::version();
    // Without a compiler, what any version of it made will do.
    let names = match (cache, &compiler) {
        (None, _) => Vec::new(),
        (Some(_), Ok((major, minor))) => vec![format!("{prefix}{major:03}.{minor}.cubin")],
        (Some(cache), Err(_)) => cache.names(&prefix),
    };
    for name in &names {
        if let Some(code) = cache.and_then(|cache| cache.read(name)) {
            return Ok(Image { code, origin: format!("file {name}") });
        }
    }
    let (major, minor) = compiler?;
    let code = nvrtc::compile(&program(), HEADERS.iter().chain(KERNELS), &options)?;
    if let (Some(cache), [name]) = (cache, &names[..]) {
        // The folder may belong to somebody else or be full: the code is at hand all the same, and
        // the next start takes as long as this one.
        let _ = cache.write(name, &code);
    }
    Ok(Image { code, origin: format!("code of NVRTC {major}.{minor} for {architecture}") })
}

/// The program: every kernel, one source after the other.
fn program() -> String {
    KERNELS.iter().map(|source| format!("#include \"{}\"\n", source.name)).collect()
}

fn options(architecture: Architecture) -> Vec<String> {
    vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        // A product and a sum become one rounded step only where a kernel says so: the bits must
        // not depend on what a version of the compiler finds.
        "--fmad=false".to_owned(),
    ]
}

/// What compiled kernels depend on, but for the compiler.
fn digest(options: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    let sources = HEADERS.iter().chain(KERNELS).flat_map(|source| [source.name, source.text]);
    for text in sources.chain(options.iter().map(String::as_str)) {
        // Lengths keep the end of one from being taken for the beginning of the next.
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_damaged_or_cut_is_no_code() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(folder.path().join("not/yet/made"));
        assert_eq!(cache.read("a"), None);
        cache.write("a", b"code").unwrap();
        assert_eq!(cache.read("a").as_deref(), Some(&b"code"[..]));
        let path = cache.folder.join("a");
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[blake3::OUT_LEN + 1] ^= 1;
        for bytes in [&damaged[..], &whole[..whole.len() - 1], &whole[..7], &[]] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.read("a"), None, "{} bytes", bytes.len());
        }
        cache.write("a", b"code").unwrap();
        assert_eq!(cache.read("a").as_deref(), Some(&b"code"[..]));
    }

    #[test]
    fn files_of_other_sources_are_not_taken_and_the_newest_compiler_is_preferred() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::in_folder(folder.path().to_owned());
        for name in ["sm_90-a-012.4.cubin", "sm_90-a-013.0.cubin", "sm_90-b-014.0.cubin"] {
            cache.write(name, b"code").unwrap();
        }
        assert_eq!(cache.names("sm_90-a-"), ["sm_90-a-013.0.cubin", "sm_90-a-012.4.cubin"]);
    }

    #[test]
    fn every_source_and_option_has_a_part_in_the_name() {
        let name = |major| digest(&options(Architecture { major, minor: 0 }));
        assert_ne!(name(8), name(9));
        let parts =
            |parts: &[&str]| digest(&parts.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_ne!(parts(&["-a", "b"]), parts(&["-ab"]));
    }

    #[test]
    fn every_source_file_is_compiled() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/kernels/cuda");
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut files: Vec<String> = files.map(|name| name.into_string().unwrap()).collect();
        files.retain(|name| name.ends_with(".cu") || name.ends_with(".cuh"));
        let mut known: Vec<&str> =
            HEADERS.iter().chain(KERNELS).map(|source| source.name).collect();
        files.sort_unstable();
        known.sort_unstable();
        assert_eq!(files, known);
    }
}
