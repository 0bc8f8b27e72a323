//! Compiles the protocol with a pure-Rust compiler, so that building needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["identity", "discovery", "registry", "telemetry"].map(|name| format!("proto/outrigger/v1/{name}.proto"));
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
