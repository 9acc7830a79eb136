//! Compiles the protos with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=entente");
    let files = protox::compile(
        [
            "entente/v1/control.proto",
            "entente/v1/enrolment.proto",
            "entente/v1/exchange.proto",
            "entente/v1/membership.proto",
            "entente/v1/packed.proto",
            "entente/v1/tenant.proto",
        ],
        ["."],
    )?;
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        // Rows stay slices of the buffer that the socket was read into.
        .bytes(".")
        .build_client(grpc)
        .build_server(grpc)
        .compile_fds(files)?;
    Ok(())
}
