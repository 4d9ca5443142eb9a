//! Compiles `cu/*.cu` for every architecture into one fat binary a file, under feature `cuda`.
//!
//! nvcc is `NVCC`, or that of `CUDA_HOME`, or the one on PATH, or the set of Python packages that
//! `scripts/cuda-compiler` installs.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    process::Command,
};

/// One `.cu` file an operation or a few of one kind. The two that take longest come first, so that no
/// thread ends with one of them alone.
const FILES: [&str; 13] = [
    "matmul",
    "linear",
    "attention",
    "draw",
    "flash",
    "group",
    "kv",
    "norm",
    "quantise",
    "repack",
    "rope",
    "rows",
    "tiles",
];

/// Machine code for the architectures in use, and PTX that the driver compiles for later ones. No source
/// tells 8.0, 8.6 and 8.9 apart, and their PTX is the same: it is made once, which takes most of the time.
const ARCHITECTURES: [&str; 2] =
    ["arch=compute_80,code=[sm_80,sm_86,sm_89,compute_80]", "arch=compute_90a,code=sm_90a"];

/// What else nvcc is told.
const OPTIONS: [&str; 3] = ["--fatbin", "-O3", "-std=c++17"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cu");
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let Some(compiler) = Compiler::find(&root) else {
        println!(
            "cargo::error=feature `cuda`: expected nvcc 13 as NVCC, in CUDA_HOME, on PATH or in \
             .cuda, found none; run scripts/cuda-compiler, which installs it from Python packages"
        );
        return;
    };
    println!("cargo::rustc-env=EXRAIL_NVCC={}", compiler.nvcc.display());
    // The files take turns in as many threads as cargo grants this build.
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_usize).max(1);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let failures = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(FILES.len()) {
            scope.spawn(|| {
                while let Some(name) =
                    FILES.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    if let Err(error) = compiler.compile(&root.join("cu"), name, &out) {
                        failures.lock().expect("no thread panics").push(error);
                    }
                }
            });
        }
    });
    for failure in failures.into_inner().expect("no thread panics") {
        println!("cargo::error={}", failure.replace('\n', " | "));
    }
}

/// Where fat binaries are kept for every kind of build: beside the folders of the profiles, which cargo puts above
/// `out` as `PROFILE/build/PACKAGE/out`.
fn kept(out: &Path) -> PathBuf {
    out.ancestors().nth(4).unwrap_or(out).join("cuda-kernels")
}

/// Removes what was made of a file before it changed. What cannot be removed only takes space.
fn remove_former(name: &str, kept: &Path) {
    let Some(Ok(files)) = kept.parent().map(fs::read_dir) else { return };
    for path in files.flatten().map(|entry| entry.path()) {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if path != kept && stem.rsplit_once('-').is_some_and(|(of, _)| of == name) {
            let _ignored = fs::remove_file(path);
        }
    }
}

struct Compiler {
    nvcc: PathBuf,
    include: Option<PathBuf>,
}

impl Compiler {
    fn find(root: &Path) -> Option<Compiler> {
        if let Some(nvcc) = env::var_os("NVCC") {
            return Some(Compiler { nvcc: nvcc.into(), include: None });
        }
        let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path = home.into_iter().chain(env::split_paths(&path));
        if let Some(nvcc) = on_path.map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file()) {
            return Some(Compiler { nvcc, include: None });
        }
        let libraries = root.ancestors().nth(2)?.join(".cuda/lib");
        let pythons = fs::read_dir(libraries).ok()?.filter_map(Result::ok);
        let mut kits = pythons.map(|python| python.path().join("site-packages/nvidia/cu13"));
        let kit = kits.find(|kit| kit.join("bin/nvcc").is_file())?;
        Some(Compiler { nvcc: kit.join("bin/nvcc"), include: Some(kit.join("include")) })
    }

    /// Compiles a file unless that was done before: this script runs again when any of them changes, or
    /// when PATH does, and once more for each kind of build: clippy, tests, release.
    fn compile(&self, sources: &Path, name: &str, out: &Path) -> Result<(), String> {
        let made_of = self.made_of(sources, name).map_err(|error| format!("cu: {error}"))?;
        let kept = kept(out).join(format!("{name}-{made_of}.fatbin"));
        let failed = |error: io::Error| format!("{}: {error}", kept.display());
        if !kept.is_file() {
            fs::create_dir_all(kept.parent().unwrap_or(out)).map_err(failed)?;
            // Another build of this tree may make the same at the same time.
            let made = kept.with_extension(std::process::id().to_string());
            self.run(sources, name, &made)?;
            fs::rename(&made, &kept).map_err(failed)?;
            remove_former(name, &kept);
        }
        fs::copy(&kept, out.join(format!("{name}.fatbin"))).map_err(failed)?;
        Ok(())
    }

    /// Everything that the code of a file depends on, as a hash: the compiler, what it is told, the file
    /// and every header.
    fn made_of(&self, sources: &Path, name: &str) -> io::Result<String> {
        let mut hasher = DefaultHasher::new();
        // NVCC may be a name that is looked up on PATH; then that is all that is known of it.
        let version = fs::metadata(&self.nvcc).and_then(|nvcc| Ok((nvcc.len(), nvcc.modified()?)));
        (&self.nvcc, version.ok()).hash(&mut hasher);
        (OPTIONS, ARCHITECTURES).hash(&mut hasher);
        let found = fs::read_dir(sources)?.map(|entry| Ok(entry?.path()));
        let mut paths = found.collect::<io::Result<Vec<PathBuf>>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "cuh"));
        paths.sort();
        paths.push(sources.join(format!("{name}.cu")));
        for path in paths {
            (path.file_name(), fs::read(&path)?).hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }

    fn run(&self, sources: &Path, name: &str, made: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.nvcc);
        command.args(OPTIONS);
        for architecture in ARCHITECTURES {
            command.arg(format!("-gencode={architecture}"));
        }
        if let Some(include) = &self.include {
            command.arg("-I").arg(include);
        }
        command.arg("-I").arg(sources);
        command.arg("-o").arg(made);
        command.arg(sources.join(format!("{name}.cu")));
        let output =
            command.output().map_err(|error| format!("nvcc {}: {error}", self.nvcc.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("cu/{name}.cu: {} failed: {messages}", self.nvcc.display()))
    }
}
