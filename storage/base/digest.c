/* SHA-256 comes from nettle and XXH3 from libxxhash; no other file includes either. */
#include "storage/base/digest.h"

#include <nettle/sha2.h>
#include <stdlib.h>
#include <xxhash.h>

_Static_assert(DIGEST_BYTES == SHA256_DIGEST_SIZE, "a digest is a SHA-256");
_Static_assert(KEY_SLOT_COUNT == 1u << 12, "key_slot takes the top 12 bits");

struct digest {
    struct sha256_ctx context;
};

struct digest *digest_new(void)
{
    struct digest *digest = malloc(sizeof *digest);

    if (digest)
        sha256_init(&digest->context);
    return digest;
}

void digest_update(struct digest *digest, const void *data, size_t bytes)
{
    if (bytes > 0)
        sha256_update(&digest->context, bytes, data);
}

void digest_finish(struct digest *digest, uint8_t out[DIGEST_BYTES])
{
    sha256_digest(&digest->context, DIGEST_BYTES, out);
    free(digest);
}

void digest_hex(const uint8_t *data, size_t bytes, char *out)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < bytes; i++) {
        out[2 * i] = digits[data[i] >> 4];
        out[2 * i + 1] = digits[data[i] & 15u];
    }
    out[2 * bytes] = '\0';
}

uint64_t key_hash(const void *key, size_t bytes)
{
    return XXH3_64bits(key, bytes);
}

uint32_t key_slot(uint64_t hash)
{
    return (uint32_t)(hash >> 52);
}
