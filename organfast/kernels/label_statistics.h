/* Inner loop of label_statistics.pyx. */
#ifndef ORGANFAST_LABEL_STATISTICS_H
#define ORGANFAST_LABEL_STATISTICS_H

#include <stddef.h>
#include <stdint.h>

#include "clones.h"

/* Sum of n values; 65,536 of them do not overflow 32 bits. */
CLONES
static int64_t statistics_sum(const uint8_t *values, ptrdiff_t n)
{
    int64_t total = 0;
    for (ptrdiff_t start = 0; start < n; start += 65536) {
        const ptrdiff_t stop = n < start + 65536 ? n : start + 65536;
        uint32_t part = 0;
        for (ptrdiff_t c = start; c < stop; c++) part += values[c];
        total += part;
    }
    return total;
}

#endif
