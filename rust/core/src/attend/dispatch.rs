//! Which instructions a call uses.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use crate::error::{Error, Result};

/// Names the instructions: `avx512`, `avx2` or `scalar`; by default the best that the CPU has.
pub const SIMD: &str = "PREFIXFAST_SIMD";

/// A set of instructions that this CPU has.
#[derive(Clone, Copy)]
pub struct Simd(pub(super) Kind);

#[derive(Clone, Copy)]
pub(super) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Scalar,
}

impl Simd {
    /// The instructions of this name.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is unknown, or the CPU does not have them.
    pub fn named(name: &str) -> Result<Self> {
        let found = match name {
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::new().map(Kind::Avx512),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::new().map(Kind::Avx2),
            "scalar" => Some(Kind::Scalar),
            _ => None,
        };
        found.map(Self).ok_or_else(|| {
            let names: Vec<_> = Self::all().iter().map(Self::name).collect();
            Error::Config(format!(
                "instructions {name:?}: this machine has {}; name one of them",
                names.join(", ")
            ))
        })
    }

    /// What [`SIMD`] names, else the best of this CPU; read once.
    ///
    /// # Errors
    /// See [`Simd::named`].
    pub fn chosen() -> Result<Self> {
        static CHOSEN: OnceLock<Result<Simd>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| match std::env::var_os(SIMD) {
                None => Ok(Self::all()[0]),
                Some(name) => Self::named(&name.to_string_lossy())
                    .map_err(|error| Error::Config(format!("environment variable {SIMD}: {error}, or unset it"))),
            })
            .clone()
    }

    /// All that this CPU has, the best first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [Avx512::new().map(Kind::Avx512), Avx2::new().map(Kind::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let vectors: [Option<Kind>; 0] = [];
        vectors.into_iter().flatten().chain([Kind::Scalar]).map(Self).collect()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            Kind::Scalar => "scalar",
        }
    }
}
