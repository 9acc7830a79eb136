//! Gives the library the name under which it is asked for.

fn main() {
    // Not the variant for shared libraries alone, which cargo passes on to those that depend on
    // this one, and so would rename the driver too.
    println!("cargo::rustc-link-arg=-Wl,-soname,libnccl.so.2");
    println!("cargo::rerun-if-changed=build.rs");
}
