//! SIMD dispatch: the instruction set that a call runs with.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::{Avx512, Avx512Bf16};
use crate::error::{Error, Result};

/// Environment variable that selects the instruction set (`avx512_bf16`, `avx512`, `avx2` or `scalar`), by default the
/// best of the CPU.
pub const SIMD_VARIABLE: &str = "PREFIXFAST_SIMD";

/// An instruction set that this CPU has.
#[derive(Clone, Copy)]
pub struct InstructionSet(pub(crate) Kind);

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    #[cfg(target_arch = "x86_64")]
    /// The second is for dense attention in bf16.
    Avx512(Avx512, Option<Avx512Bf16>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Scalar,
}

impl InstructionSet {
    /// Instruction set of the given name.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is unknown or the CPU lacks the instructions.
    pub fn named(name: &str) -> Result<Self> {
        let found = match name {
            #[cfg(target_arch = "x86_64")]
            "avx512_bf16" => avx512_bf16(),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::new().map(|simd| Kind::Avx512(simd, None)),
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

    /// Instruction set that [`SIMD_VARIABLE`] names, else the best of this CPU. The variable is read once per process.
    ///
    /// # Errors
    /// [`Error::Config`] if the variable names an unknown instruction set or one that the CPU lacks.
    pub fn selected() -> Result<Self> {
        static SELECTED: OnceLock<Result<InstructionSet>> = OnceLock::new();
        SELECTED
            .get_or_init(|| match std::env::var_os(SIMD_VARIABLE) {
                None => Ok(Self::all()[0]),
                Some(name) => Self::named(&name.to_string_lossy()).map_err(|error| {
                    Error::Config(format!("environment variable {SIMD_VARIABLE}: {error}, or unset it"))
                }),
            })
            .clone()
    }

    /// All instruction sets of this CPU, the best first and the scalar one last.
    #[must_use]
    pub fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = {
            let avx512 = Avx512::new().map(|simd| Kind::Avx512(simd, None));
            let [first, second] = if Avx512Bf16::is_fast() {
                [avx512_bf16(), avx512]
            } else {
                [avx512, avx512_bf16()]
            };
            [first, second, Avx2::new().map(Kind::Avx2)]
        };
        #[cfg(not(target_arch = "x86_64"))]
        let vectors: [Option<Kind>; 0] = [];
        vectors.into_iter().flatten().chain([Kind::Scalar]).map(Self).collect()
    }

    /// Name of the instruction set.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_, Some(_)) => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_, None) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            Kind::Scalar => "scalar",
        }
    }
}

/// AVX-512 with bf16 dot products.
#[cfg(target_arch = "x86_64")]
fn avx512_bf16() -> Option<Kind> {
    let (simd, bf16) = (Avx512::new()?, Avx512Bf16::new()?);
    Some(Kind::Avx512(simd, Some(bf16)))
}
