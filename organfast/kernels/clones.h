/* One wheel, wide vectors where the machine has them: a function marked CLONES is compiled for
   three kinds of x86-64 and the loader picks one. Without fused multiply-add (see setup.py) the
   clones round alike. Address sanitizer does not survive the choice at load time. */
#ifndef ORGANFAST_CLONES_H
#define ORGANFAST_CLONES_H

#include <stdint.h> /* defines __GLIBC__ */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) \
    && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

#endif
