/* Fuzz target of index/vector_file.c and index/truth_file.c: the first byte picks the format, the
 * rest is the file, served by a vfs from memory. What opens must be readable to its last row or
 * name the row that is not. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "index/truth_file.h"
#include "index/vector_file.h"
#include "index/vector_source.h"
#include "tests/support/memory_vfs.h"

static void check_error(const struct error *err)
{
    assert(err->code == ERR_INVALID && err->message[0]);
}

static void read_source(struct vfs *vfs, const char *path, size_t bytes)
{
    struct error err = ERROR_INIT;
    struct vector_source *source;

    if (vector_source_open(vfs, path, &source, &err) < 0) {
        check_error(&err);
        return;
    }
    uint64_t rows = vector_source_rows(source);
    uint32_t dim = vector_source_dim(source), row_bytes = vector_source_row_bytes(source);
    assert(rows && dim && row_bytes && rows <= bytes / row_bytes);

    uint8_t *raw = malloc(rows * row_bytes);
    float *out = malloc(rows * dim * sizeof *out), *last = malloc(dim * sizeof *last);
    if (raw && out && last) {
        if (vector_source_read(source, 0, rows, raw, &err) < 0)
            check_error(&err);
        else
            vector_source_check(source, raw, 0, rows, NULL);
        error_clear(&err);
        if (vector_source_read_f32(source, 0, rows, out, &err) < 0) {
            check_error(&err);
        } else {
            int rc = vector_source_read_f32(source, rows - 1, 1, last, &err);
            assert(rc == 0);
            assert(memcmp(last, out + (rows - 1) * dim, dim * sizeof *last) == 0);
        }
    }
    free(raw);
    free(out);
    free(last);
    vector_source_close(source);
}

static void read_keys(struct vfs *vfs, size_t bytes)
{
    struct error err = ERROR_INIT;
    struct npy_keys *keys;

    if (npy_keys_open(vfs, "keys.npy", &keys, &err) < 0) {
        check_error(&err);
        return;
    }
    uint64_t count = npy_keys_count(keys);
    assert(count && count <= bytes / 4);
    int64_t *out = malloc(count * sizeof *out);
    if (out && npy_keys_read(keys, 0, count, out, &err) < 0)
        check_error(&err);
    free(out);
    npy_keys_close(keys);
}

static void read_truth(struct vfs *vfs)
{
    struct error err = ERROR_INIT;
    struct truth truth;

    if (truth_file_read(vfs, "truth.gt.bin", 1000, &truth, &err) < 0) {
        check_error(&err);
        return;
    }
    for (uint64_t i = 0; i < (uint64_t)truth.query_count * truth.k; i++)
        assert(truth.ids[i] < 1000);
    truth_release(&truth);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const char *const paths[] = {"x.fbin",  "x.u8bin", "x.i8bin",
                                        "x.fvecs", "x.bvecs", "x.npy"};
    struct memory_vfs memory;

    if (!bytes)
        return 0;
    memory_vfs_init(&memory, data + 1, bytes - 1);
    switch (data[0] % 8) {
    case 6:
        read_keys(&memory.vfs, memory.bytes);
        break;
    case 7:
        read_truth(&memory.vfs);
        break;
    default:
        read_source(&memory.vfs, paths[data[0] % 8], memory.bytes);
        break;
    }
    return 0;
}
