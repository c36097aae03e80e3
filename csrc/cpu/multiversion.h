// Functions in several versions, one for each instruction set: one binary that runs on any x86-64 and uses the widest
// vectors of the machine it runs on. The loader chooses, once. On other processors, or without GNU ifunc, only the
// plain function is built; nor under sanitizers, where three versions take minutes a file. Everything that such a
// function calls must be inlined into it (LWKD_INLINE), or it is built for the oldest machine only.

#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
#define LWKD_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LWKD_HAS_MULTIVERSION 1
#else
#define LWKD_MULTIVERSION
#define LWKD_HAS_MULTIVERSION 0
#endif

#define LWKD_INLINE inline __attribute__((always_inline))
