// Function clones: one binary that runs on any x86-64 and uses the widest vectors of the machine it runs on.
// The choice is made once, by the loader. On other processors, or without GNU ifunc, the plain function is built.
// Everything that a clone calls must be inlined into it, or it runs with the vectors of the oldest machine.

#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define LWKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LWKD_HAS_CLONES 1
#else
#define LWKD_CLONES
#define LWKD_HAS_CLONES 0
#endif

#define LWKD_INLINE inline __attribute__((always_inline))
