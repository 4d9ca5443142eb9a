//! Compiles `cu/*.cu` for every architecture into one fat binary a file, under feature `cuda`.
//!
//! nvcc is `NVCC`, or that of `CUDA_HOME`, or the one on PATH, or the set of Python packages that
//! `scripts/cuda-compiler` installs.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// One `.cu` file an operation or a few of one kind.
const FILES: [&str; 12] = [
    "attention",
    "flash",
    "group",
    "kv",
    "linear",
    "matmul",
    "norm",
    "quantise",
    "repack",
    "rope",
    "rows",
    "tiles",
];

/// Machine code for the architectures in use, and PTX that the driver compiles for later ones.
const ARCHITECTURES: [&str; 5] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_86,code=sm_86",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];

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

    fn compile(&self, sources: &Path, name: &str, out: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.nvcc);
        command.args(["--fatbin", "-O3", "-std=c++17"]);
        for architecture in ARCHITECTURES {
            command.arg(format!("-gencode={architecture}"));
        }
        if let Some(include) = &self.include {
            command.arg("-I").arg(include);
        }
        command.arg("-I").arg(sources);
        command.arg("-o").arg(out.join(format!("{name}.fatbin")));
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
