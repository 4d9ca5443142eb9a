//! `exrail-bench`: what must be measured on a real machine and cannot be a unit test.
//!
//! `cpu` compares decode and prefill with llama.cpp's own `llama-bench`; `soak` drives a server with
//! many clients that hang up at random. Both print a table and write a record. Neither is part of
//! the product, and nothing depends on this crate.

mod cpu;
mod machine;
mod once;
mod peer;
mod random;
mod record;
mod soak;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "exrail-bench", about = "Speed against llama.cpp, and the soak of a server")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare prefill and decode with llama-bench, in turns
    Cpu(cpu::CpuArguments),
    /// One run of our side, as JSON; `cpu` starts it in a process of its own
    #[command(hide = true)]
    CpuOnce(once::OnceArguments),
    /// Drive a server with many clients that cancel at random
    Soak(soak::SoakArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Cpu(arguments) => cpu::run(&arguments),
        Command::CpuOnce(arguments) => once::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ignored = writeln!(io::stderr(), "exrail-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
