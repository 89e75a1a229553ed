/* Fuzzes cells_decode_bytes: the checksum is made right unless the first byte says otherwise, since
 * the writer of a file may be hostile. What is accepted must rank without a step outside its
 * scratch, give every instruction set the same cells, and print to the same bytes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/cells.h"
#include "storage/base/bytes.h"

/* As in cells.c. */
#define CRC_AT 12u
#define HEADER_BYTES 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static void use(const struct cells *cells, uint32_t want, const uint8_t *seed, size_t seed_bytes)
{
    uint32_t dim = cells_dim(cells), count = cells_count(cells);
    uint32_t found_wanted = want < count ? want : count;
    float *query = malloc(dim * sizeof *query);
    uint32_t *first = malloc((want + 1) * sizeof *first), *out = malloc((want + 1) * sizeof *out);
    void *scratch = aligned_alloc(64, align_up(cells_scratch_bytes(cells, want), 64));

    require(query && first && out && scratch, "no memory");
    require(cells_rows(cells) > 0 && cells_memory_bytes(cells) > 0, "cells of nothing");
    for (uint32_t d = 0; d < dim; d++) /* bits of any kind: no numbers and infinities too */
        query[d] = d % 3 ? (float)(int8_t)seed[d % seed_bytes]
                         : load_f32(seed + d % (seed_bytes - sizeof(float)));
    for (int metric = METRIC_L2; metric <= METRIC_IP; metric++) {
        for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
            const struct distance_kernels *kernels = distance_kernels_for(isa);
            uint32_t found;

            if (!kernels)
                continue;
            found = cells_nearest(cells, kernels, (enum metric)metric, query, want, scratch, out);
            require(found == found_wanted, "too few cells");
            for (uint32_t i = 0; i < found; i++)
                require(out[i] < count && (i == 0 || out[i - 1] < out[i]), "no such order");
            if (isa == ISA_SCALAR)
                memcpy(first, out, found * sizeof *out);
            require(!memcmp(first, out, found * sizeof *out), "instruction sets disagree");
        }
    }
    free(query);
    free(first);
    free(out);
    free(scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct cells *cells = NULL;
    struct error err = ERROR_INIT;
    uint8_t *copy, *printed = NULL;
    size_t printed_bytes;

    if (bytes < 2)
        return 0;
    uint8_t mode = data[0];

    bytes--;
    copy = malloc(bytes);
    require(copy != NULL, "no memory");
    memcpy(copy, data + 1, bytes);
    if (!(mode & 1) && bytes >= HEADER_BYTES) {
        store_u32(copy + CRC_AT, 0);
        store_u32(copy + CRC_AT, crc32c(0, copy, bytes));
    }
    if (cells_decode_bytes(copy, bytes, "input", &cells, &err) == 0) {
        use(cells, mode >> 1, copy, bytes);
        require(cells_encode_bytes(cells, &printed, &printed_bytes, &err) == 0, "print");
        require(printed_bytes == bytes && !memcmp(printed, copy, bytes), "prints differently");
        free(printed);
    } else {
        require(cells == NULL && (err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED),
                "another error");
    }
    cells_free(cells);
    free(copy);
    return 0;
}
