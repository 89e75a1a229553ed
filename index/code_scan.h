/* code_scan: sums of table look-ups over codes, the inner loop of every estimate.
 *
 * A code is a row of bytes. For one query, each value of each byte contributes an unsigned 16-bit
 * share (struct code_table), and the sum of a code's shares stands for its distance: the walk scans
 * whole cells of codes with it, and the neighbours of the nodes it expands. Integers, so that every
 * instruction set gives the same sums: an answer does not depend on the machine's kernels.
 * (Andre, Kermarrec, Le Scouarnec, "Cache locality is not enough", 2015, hold 4-bit tables in
 * registers; here the 256 entries of a byte fill eight 512-bit registers.)
 *
 * Pure functions without state: any thread. */
#ifndef ANND_INDEX_CODE_SCAN_H
#define ANND_INDEX_CODE_SCAN_H

#include <stdint.h>

#include "index/distance.h"

/* A query's table: distance = offset + step * sum. */
struct code_table {
    uint16_t *entries; /* chunk_count x 256, 64-byte aligned, the caller's */
    uint32_t chunk_count;
    float step;
    float offset;
};

/* Puts chunk_count x 256 float shares on the integer scale: a chunk's least share becomes 0 and
 * goes into the offset; the step is the least at which no sum exceeds 65,535. Non-finite shares are
 * not allowed. A table of equal shares gets step 0. */
void code_table_fill(struct code_table *table, const float *shares, uint32_t chunk_count);

/* Codes of rows that follow one another. */
struct code_span {
    uint64_t first;
    uint32_t count; /* may be 0 */
};

struct code_scan_kernels {
    const char *name; /* as distance_kernels */

    /* A row's sum is the sum over c < chunk_count of entries[c * 256 + code[c]]. sums gets those
     * of all rows of all spans, one span after the other, below 2^32 in all. Codes stand
     * code_stride >= chunk_count bytes apart; no byte past the chunk_count of a row asked for is
     * read. Codes of later rows are prefetched, across spans: many short spans in one call cost
     * what one long span does. */
    void (*spans)(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                  uint64_t code_stride, const struct code_span *spans, uint32_t span_count,
                  uint16_t *sums);
    /* The same for rows[i]; rows may repeat. Codes of later rows are prefetched. */
    void (*rows)(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                 uint64_t code_stride, const uint32_t *rows, uint32_t count, uint16_t *sums);
    /* Writes the i < count with sums[i] <= limit, ascending, and returns how many. */
    uint32_t (*below)(const uint16_t *sums, uint32_t count, uint16_t limit, uint32_t *out);
    /* The nth smallest of count sums, 1 <= nth <= count: what `below` takes to find nth sums, or
     * more where some are equal. */
    uint16_t (*nth)(const uint16_t *sums, uint32_t count, uint32_t nth);
    /* code_table_fill, which calls that of the best set; the same on all, to the bit. */
    void (*fill)(struct code_table *table, const float *shares, uint32_t chunk_count);
};

/* NULL when this CPU, system or build lacks the set; ISA_SCALAR is always there. */
const struct code_scan_kernels *code_scan_kernels_for(enum isa isa);
/* The version for the instruction set that distance_kernels_best chose, hence for ANND_ISA too. */
const struct code_scan_kernels *code_scan_kernels_best(void);

/* As built, for code_scan.c: calling one that the CPU lacks ends in an illegal instruction. */
extern const struct code_scan_kernels code_scan_avx512_kernels;
extern const struct code_scan_kernels code_scan_avx512vnni_kernels; /* the same under its name */
/* What `fill` does with the 256 shares of a chunk. */
struct code_fill_passes {
    void (*range)(const float *shares, float *least, float *greatest);
    /* entries[i] = (shares[i] - least) * scale, rounded to the nearest integer, ties to even. */
    void (*entries)(const float *shares, float least, float scale, uint16_t *entries);
};
void code_scan_fill(struct code_table *table, const float *shares, uint32_t chunk_count,
                    const struct code_fill_passes *passes);
/* rows of the scalar table, for the few rows at which a wide one does not pay. */
void code_scan_scalar_rows(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                           uint64_t code_stride, const uint32_t *rows, uint32_t count,
                           uint16_t *sums);

#endif
