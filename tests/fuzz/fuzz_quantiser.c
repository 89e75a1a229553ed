/* Fuzzes quantiser_decode_bytes: length and checksum are made right unless the first byte says
 * otherwise, since the writer of a file may be hostile. What is accepted must encode, decode and
 * estimate without a step outside its buffers, and print to the same bytes. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_scan.h"
#include "index/quantiser.h"
#include "tests/support/fuzz_support.h"

#define CODES 9u

/* Codes of any bytes: they come from a file as well. */
static void use(const struct quantiser *quantiser, const uint8_t *seed, size_t seed_bytes)
{
    uint32_t dim = quantiser_dim(quantiser), code_bytes = quantiser_code_bytes(quantiser);
    struct code_table table = {.entries =
                                   aligned_alloc(64, 2 * quantiser_table_entries(quantiser))};
    float *scratch = malloc(quantiser_scratch_floats(quantiser) * sizeof *scratch);
    float *vector = malloc(2 * dim * sizeof *vector);
    uint16_t sums[CODES];
    uint8_t *codes = malloc((size_t)CODES * code_bytes);
    static const uint32_t rows[CODES] = {8, 0, 3, 3, 7, 1, 2, 6, 5};
    struct error err = ERROR_INIT;

    require(table.entries && scratch && vector && codes, "no memory");
    for (size_t i = 0; i < (size_t)CODES * code_bytes; i++)
        codes[i] = (uint8_t)(seed[i % seed_bytes] + i * 29);
    for (uint32_t i = 0; i < 2 * dim; i++)
        vector[i] = (float)(int8_t)seed[(i + 7) % seed_bytes] / 16;
    for (int metric = METRIC_L2; metric <= METRIC_IP; metric++) {
        quantiser_table(quantiser, (enum metric)metric, vector, scratch, &table);
        require(isfinite(table.offset) && isfinite(table.step), "a table without end");
        require(table.chunk_count <= code_bytes, "a table of more chunks than bytes");
        code_scan_kernels_best()->rows(table.entries, table.chunk_count, codes, code_bytes, rows,
                                       CODES, sums);
        /* The order of rows does not change an estimate. */
        require(sums[2] == sums[3], "one code, two estimates");
    }
    require(quantiser_encode(quantiser, vector, 2, NULL, codes, &err) == 0, "encode");
    quantiser_decode(quantiser, codes, vector);
    require(quantiser_code_distortion(quantiser, codes) >= 0, "less than no distortion");
    require(quantiser_memory_bytes(quantiser) > 0, "memory of nothing");
    free(table.entries);
    free(scratch);
    free(vector);
    free(codes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct quantiser *quantiser = NULL;
    struct error err = ERROR_INIT;
    uint8_t *copy, *printed = NULL;
    size_t printed_bytes;

    if (bytes < 2)
        return 0;
    uint8_t mode = data[0];

    bytes--;
    copy = fuzz_copy(data + 1, bytes);
    if (!(mode & 1))
        fuzz_sign_length(copy, bytes);
    if (quantiser_decode_bytes(copy, bytes, "input", &quantiser, &err) == 0) {
        use(quantiser, copy, bytes);
        require(quantiser_encode_bytes(quantiser, &printed, &printed_bytes, &err) == 0, "print");
        require(printed_bytes == bytes && !memcmp(printed, copy, bytes), "prints differently");
        free(printed);
    } else {
        require(quantiser == NULL && (err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED),
                "another error");
    }
    quantiser_free(quantiser);
    free(copy);
    return 0;
}
