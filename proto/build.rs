//! Generates the gRPC control plane and the data-plane message types. protox compiles the .proto files, so no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=efc");
    let fds = protox::compile(["efc/control.proto", "efc/data.proto", "efc/state.proto"], ["."])?;
    tonic_prost_build::configure().bytes(".").compile_fds(fds)?;
    Ok(())
}
