/* Fuzzes manifest_decode. The first byte picks the kind of file; magic, version, length and CRC are
 * made right before decoding, for a fuzzer would never guess them, unless the top bit asks for the
 * bytes as they are. What is accepted must encode to the same bytes again: there is one encoding of
 * every content. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/manifest.h"
#include "tests/support/fuzz_support.h"

static void use(const struct manifest *manifest)
{
    for (uint32_t i = 0; i < manifest_count(manifest); i++) {
        char text[40];
        const char *name = manifest_entry(manifest, i, text, sizeof text), *value;
        const uint8_t *raw;
        size_t raw_bytes;
        uint64_t number;
        double real;
        int types = 0;

        types += manifest_get_u64(manifest, name, &number, NULL) == 0;
        types += manifest_get_f64(manifest, name, &real, NULL) == 0;
        types += manifest_get_text(manifest, name, &value, NULL) == 0;
        types += manifest_get_bytes(manifest, name, &raw, &raw_bytes, NULL) == 0;
        require(types == 1, "an entry has another number of types than one");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const char magics[4][9] = {"ANNDSEGM", "ANNDIDXM", "ANNDDATM", "ANNDJOBM"};
    struct manifest *manifest = NULL;
    struct error err = ERROR_INIT;
    enum manifest_kind kind;
    uint8_t *copy, *again;
    size_t again_bytes;

    if (bytes < 1)
        return 0;
    kind = (enum manifest_kind)(data[0] % 4);
    copy = fuzz_copy(data + 1, bytes - 1);
    if (!(data[0] & 0x80) && bytes > 64) {
        memcpy(copy, magics[kind], 8);
        store_u32(copy + 8, 1);
        fuzz_sign_length(copy, bytes - 1);
    }
    if (manifest_decode(kind, copy, bytes - 1, "fuzz", &manifest, &err) == 0) {
        use(manifest);
        require(manifest_encode(manifest, &again, &again_bytes, &err) == 0, "no encoding");
        require(again_bytes == bytes - 1 && memcmp(again, copy, again_bytes) == 0,
                "two encodings of one content");
        free(again);
    } else {
        require(err.code != ERR_NONE && err.message[0], "an error without a message");
    }
    manifest_free(manifest);
    free(copy);
    return 0;
}
