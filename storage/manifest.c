/* How it works: the entries are an array sorted by name, searched by halving. Setting an entry
 * keeps the order, so encoding is one pass and equal contents give equal bytes. Decoding accepts
 * nothing an encoder would not have written: names must ascend strictly, lengths must fit what is
 * left of the file, reserved bytes must be zero, and the last entry must end where the file ends.
 *
 * Publishing keeps two generations: the bytes that are current are first published again as
 * `path.1`, and only then is the new file renamed over `path`. At every instant `path` is whole. */
#include "storage/manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/base/digest.h"
#include "storage/file.h"

#define HEADER_BYTES 64u
#define ENTRY_HEADER_BYTES 8u
#define FORMAT_VERSION 1u
#define FEATURES_INCOMPAT_KNOWN 0u
/* A manifest of MANIFEST_BYTES_MAX could not hold more: eight bytes of header and a name each. */
#define ENTRY_COUNT_MAX (MANIFEST_BYTES_MAX / (ENTRY_HEADER_BYTES + 1u))

enum entry_type { TYPE_U64 = 1, TYPE_F64, TYPE_TEXT, TYPE_BYTES };

static const char *const type_names[] = {"?", "u64", "f64", "text", "bytes"};
static const char magics[][9] = {"ANNDSEGM", "ANNDIDXM", "ANNDDATM", "ANNDJOBM"};

struct entry {
    char *name;
    uint8_t *value; /* a NUL follows, so that text is text */
    uint32_t value_bytes;
    enum entry_type type;
};

struct manifest {
    enum manifest_kind kind;
    uint32_t features_compat; /* kept as read, for the next write */
    uint32_t count;
    uint32_t capacity;
    struct entry *entries;
    char *where; /* NULL: not read from anywhere */
};

static const char *where_of(const struct manifest *manifest)
{
    return manifest->where ? manifest->where : "manifest";
}

struct manifest *manifest_new(enum manifest_kind kind)
{
    struct manifest *manifest = calloc(1, sizeof *manifest);

    if (manifest)
        manifest->kind = kind;
    return manifest;
}

void manifest_free(struct manifest *manifest)
{
    if (!manifest)
        return;
    for (uint32_t i = 0; i < manifest->count; i++) {
        free(manifest->entries[i].name);
        free(manifest->entries[i].value);
    }
    free(manifest->entries);
    free(manifest->where);
    free(manifest);
}

/* Index of `name`, or where it would be inserted. */
static uint32_t lower_bound(const struct manifest *manifest, const char *name, bool *found)
{
    uint32_t low = 0;
    uint32_t high = manifest->count;

    *found = false;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = strcmp(manifest->entries[middle].name, name);

        if (order == 0) {
            *found = true;
            return middle;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool name_is_valid(const char *name, size_t bytes)
{
    if (bytes == 0 || bytes > MANIFEST_NAME_MAX)
        return false;
    for (size_t i = 0; i < bytes; i++) {
        char c = name[i];
        bool ok = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
                  c == '/' || c == '-';

        if (!ok)
            return false;
    }
    return true;
}

static int reserve_one(struct manifest *manifest, struct error *err)
{
    if (manifest->count == manifest->capacity) {
        uint32_t capacity = manifest->capacity ? 2 * manifest->capacity : 32;
        struct entry *entries = realloc(manifest->entries, capacity * sizeof *entries);

        if (!entries)
            return error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu32 " entries",
                             where_of(manifest), capacity);
        manifest->entries = entries;
        manifest->capacity = capacity;
    }
    return 0;
}

/* Inserts at `at`, or replaces the entry there when `replace`. Copies name and value. */
static int put(struct manifest *manifest, uint32_t at, bool replace, const char *name,
               size_t name_bytes, enum entry_type type, const void *value, size_t bytes,
               struct error *err)
{
    uint8_t *value_copy = NULL;
    char *name_copy = NULL;
    int rc = -1;

    if (!replace && reserve_one(manifest, err) < 0)
        goto done;
    value_copy = malloc(bytes + 1);
    name_copy = malloc(name_bytes + 1);
    if (!value_copy || !name_copy) {
        error_set(err, ERR_NOMEM, "%s: no memory for an entry of %zu bytes", where_of(manifest),
                  bytes);
        goto done;
    }
    if (bytes > 0)
        memcpy(value_copy, value, bytes);
    value_copy[bytes] = 0;
    memcpy(name_copy, name, name_bytes);
    name_copy[name_bytes] = 0;
    if (replace) {
        free(manifest->entries[at].value);
        free(manifest->entries[at].name);
    } else {
        memmove(manifest->entries + at + 1, manifest->entries + at,
                (manifest->count - at) * sizeof *manifest->entries);
        manifest->count++;
    }
    manifest->entries[at] = (struct entry){name_copy, value_copy, (uint32_t)bytes, type};
    name_copy = NULL;
    value_copy = NULL;
    rc = 0;
done:
    free(name_copy);
    free(value_copy);
    return rc;
}

static int set(struct manifest *manifest, const char *name, enum entry_type type, const void *value,
               size_t bytes, struct error *err)
{
    size_t name_bytes = strlen(name);
    bool found;
    uint32_t at;

    if (!name_is_valid(name, name_bytes))
        return error_set(err, ERR_INVALID,
                         "%s: entry name \"%.64s\" must be 1 to %u characters of [a-z0-9._/-]",
                         where_of(manifest), name, MANIFEST_NAME_MAX);
    if (bytes > MANIFEST_BYTES_MAX)
        return error_set(err, ERR_INVALID, "%s: entry %s has %zu bytes, at most %u are allowed",
                         where_of(manifest), name, bytes, MANIFEST_BYTES_MAX);
    at = lower_bound(manifest, name, &found);
    return put(manifest, at, found, name, name_bytes, type, value, bytes, err);
}

int manifest_set_u64(struct manifest *manifest, const char *name, uint64_t value, struct error *err)
{
    uint8_t bytes[8];

    store_u64(bytes, value);
    return set(manifest, name, TYPE_U64, bytes, sizeof bytes, err);
}

int manifest_set_f64(struct manifest *manifest, const char *name, double value, struct error *err)
{
    uint8_t bytes[8];

    store_f64(bytes, value);
    return set(manifest, name, TYPE_F64, bytes, sizeof bytes, err);
}

int manifest_set_text(struct manifest *manifest, const char *name, const char *text,
                      struct error *err)
{
    return set(manifest, name, TYPE_TEXT, text, strlen(text), err);
}

int manifest_set_bytes(struct manifest *manifest, const char *name, const void *data, size_t bytes,
                       struct error *err)
{
    return set(manifest, name, TYPE_BYTES, data, bytes, err);
}

void manifest_remove(struct manifest *manifest, const char *name)
{
    bool found;
    uint32_t at = lower_bound(manifest, name, &found);

    if (!found)
        return;
    free(manifest->entries[at].name);
    free(manifest->entries[at].value);
    manifest->count--;
    memmove(manifest->entries + at, manifest->entries + at + 1,
            (manifest->count - at) * sizeof *manifest->entries);
}

static const struct entry *get(const struct manifest *manifest, const char *name,
                               enum entry_type type, struct error *err)
{
    bool found;
    uint32_t at = lower_bound(manifest, name, &found);

    if (!found) {
        error_set(err, ERR_CORRUPT, "%s: entry %s is missing", where_of(manifest), name);
        return NULL;
    }
    if (manifest->entries[at].type != type) {
        error_set(err, ERR_CORRUPT, "%s: entry %s is of type %s, wanted %s", where_of(manifest),
                  name, type_names[manifest->entries[at].type], type_names[type]);
        return NULL;
    }
    return &manifest->entries[at];
}

int manifest_get_u64(const struct manifest *manifest, const char *name, uint64_t *value,
                     struct error *err)
{
    const struct entry *entry = get(manifest, name, TYPE_U64, err);

    if (!entry)
        return -1;
    *value = load_u64(entry->value);
    return 0;
}

int manifest_get_u64_in(const struct manifest *manifest, const char *name, uint64_t min,
                        uint64_t max, uint64_t *value, struct error *err)
{
    uint64_t found;

    if (manifest_get_u64(manifest, name, &found, err) < 0)
        return -1;
    if (found < min || found > max)
        return error_set(err, ERR_CORRUPT,
                         "%s: entry %s is %" PRIu64 ", outside %" PRIu64 "..%" PRIu64,
                         where_of(manifest), name, found, min, max);
    *value = found;
    return 0;
}

int manifest_get_f64(const struct manifest *manifest, const char *name, double *value,
                     struct error *err)
{
    const struct entry *entry = get(manifest, name, TYPE_F64, err);

    if (!entry)
        return -1;
    *value = load_f64(entry->value);
    return 0;
}

int manifest_get_text(const struct manifest *manifest, const char *name, const char **text,
                      struct error *err)
{
    const struct entry *entry = get(manifest, name, TYPE_TEXT, err);

    if (!entry)
        return -1;
    *text = (const char *)entry->value;
    return 0;
}

int manifest_get_bytes(const struct manifest *manifest, const char *name, const uint8_t **data,
                       size_t *bytes, struct error *err)
{
    const struct entry *entry = get(manifest, name, TYPE_BYTES, err);

    if (!entry)
        return -1;
    *data = entry->value;
    *bytes = entry->value_bytes;
    return 0;
}

bool manifest_has(const struct manifest *manifest, const char *name)
{
    bool found;

    lower_bound(manifest, name, &found);
    return found;
}

uint32_t manifest_count(const struct manifest *manifest)
{
    return manifest->count;
}

const char *manifest_entry(const struct manifest *manifest, uint32_t i, char *out, size_t out_bytes)
{
    const struct entry *entry;

    if (i >= manifest->count)
        return NULL;
    entry = &manifest->entries[i];
    if (out_bytes == 0)
        return entry->name;
    switch (entry->type) {
    case TYPE_U64:
        snprintf(out, out_bytes, "%" PRIu64, load_u64(entry->value));
        break;
    case TYPE_F64:
        snprintf(out, out_bytes, "%.17g", load_f64(entry->value));
        break;
    case TYPE_TEXT:
        snprintf(out, out_bytes, "%s", (const char *)entry->value);
        break;
    case TYPE_BYTES: {
        size_t shown = (out_bytes - 1) / 2;

        if (shown > entry->value_bytes)
            shown = entry->value_bytes;
        out[0] = 0;
        digest_hex(entry->value, shown, out);
        break;
    }
    }
    return entry->name;
}

int manifest_encode(const struct manifest *manifest, uint8_t **out, size_t *bytes,
                    struct error *err)
{
    uint64_t total = HEADER_BYTES;
    uint8_t *data, *at;

    for (uint32_t i = 0; i < manifest->count; i++) {
        total += ENTRY_HEADER_BYTES + strlen(manifest->entries[i].name) +
                 manifest->entries[i].value_bytes;
        if (total > MANIFEST_BYTES_MAX)
            return error_set(err, ERR_INVALID, "%s: more than %u bytes of entries",
                             where_of(manifest), MANIFEST_BYTES_MAX);
    }
    data = calloc(1, total);
    if (!data)
        return error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu64 " bytes", where_of(manifest),
                         total);
    memcpy(data, magics[manifest->kind], 8);
    store_u32(data + 8, FORMAT_VERSION);
    store_u64(data + 16, total);
    store_u32(data + 28, manifest->features_compat);
    store_u32(data + 32, manifest->count);
    at = data + HEADER_BYTES;
    for (uint32_t i = 0; i < manifest->count; i++) {
        const struct entry *entry = &manifest->entries[i];
        size_t name_bytes = strlen(entry->name);

        store_u16(at, (uint16_t)name_bytes);
        at[2] = (uint8_t)entry->type;
        store_u32(at + 4, entry->value_bytes);
        memcpy(at + ENTRY_HEADER_BYTES, entry->name, name_bytes);
        memcpy(at + ENTRY_HEADER_BYTES + name_bytes, entry->value, entry->value_bytes);
        at += ENTRY_HEADER_BYTES + name_bytes + entry->value_bytes;
    }
    store_u32(data + 12, crc32c(0, data, total));
    *out = data;
    *bytes = total;
    return 0;
}

/* CRC of the whole file with its own field as zero. */
static uint32_t file_crc(const uint8_t *data, size_t bytes)
{
    static const uint8_t zero[4];
    uint32_t crc = crc32c(0, data, 12);

    crc = crc32c(crc, zero, sizeof zero);
    return crc32c(crc, data + 16, bytes - 16);
}

static int check_header(enum manifest_kind kind, const uint8_t *data, size_t bytes,
                        const char *where, struct error *err)
{
    uint32_t crc;

    if (bytes < HEADER_BYTES)
        return error_set(err, ERR_CORRUPT, "%s: the file ends at byte %zu, the header has %u",
                         where, bytes, HEADER_BYTES);
    if (bytes > MANIFEST_BYTES_MAX)
        return error_set(err, ERR_CORRUPT, "%s: %zu bytes, at most %u are allowed", where, bytes,
                         MANIFEST_BYTES_MAX);
    if (memcmp(data, magics[kind], 8) != 0)
        return error_set(err, ERR_CORRUPT, "%s: does not start with \"%s\"", where, magics[kind]);
    if (load_u32(data + 8) != FORMAT_VERSION)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: format version %" PRIu32 ", this program reads version %u", where,
                         load_u32(data + 8), FORMAT_VERSION);
    if (load_u64(data + 16) != bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: the header says %" PRIu64 " bytes, the file has %zu", where,
                         load_u64(data + 16), bytes);
    crc = file_crc(data, bytes);
    if (crc != load_u32(data + 12))
        return error_set(err, ERR_CORRUPT,
                         "%s: CRC-32C is %08" PRIx32 ", the header says %08" PRIx32, where, crc,
                         load_u32(data + 12));
    if (load_u32(data + 24) & ~FEATURES_INCOMPAT_KNOWN)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: needs features %08" PRIx32 " this program does not know", where,
                         load_u32(data + 24) & ~FEATURES_INCOMPAT_KNOWN);
    for (uint32_t i = 36; i < HEADER_BYTES; i++) {
        if (data[i] != 0)
            return error_set(err, ERR_CORRUPT, "%s: reserved byte %" PRIu32 " is not zero", where,
                             i);
    }
    return 0;
}

/* Decodes the entry at *at and appends it; the names so far ascend, so this one must be larger. */
static int decode_entry(struct manifest *manifest, const uint8_t *data, size_t bytes, size_t *at,
                        struct error *err)
{
    size_t left = bytes - *at;
    uint32_t name_bytes, value_bytes;
    const char *name;
    const uint8_t *value;
    uint8_t type;

    if (left < ENTRY_HEADER_BYTES)
        return error_set(err, ERR_CORRUPT, "%s: the file ends inside an entry at byte %zu",
                         where_of(manifest), *at);
    name_bytes = load_u16(data + *at);
    type = data[*at + 2];
    value_bytes = load_u32(data + *at + 4);
    if (data[*at + 3] != 0)
        return error_set(err, ERR_CORRUPT, "%s: reserved byte %zu is not zero", where_of(manifest),
                         *at + 3);
    left -= ENTRY_HEADER_BYTES;
    if (name_bytes > left || value_bytes > left - name_bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: entry at byte %zu claims %" PRIu32 " + %" PRIu32
                         " bytes, %zu are left",
                         where_of(manifest), *at, name_bytes, value_bytes, left);
    name = (const char *)data + *at + ENTRY_HEADER_BYTES;
    value = data + *at + ENTRY_HEADER_BYTES + name_bytes;
    if (!name_is_valid(name, name_bytes))
        return error_set(err, ERR_CORRUPT, "%s: entry at byte %zu has no valid name",
                         where_of(manifest), *at);
    if (type < TYPE_U64 || type > TYPE_BYTES)
        return error_set(err, ERR_UNSUPPORTED, "%s: entry %.*s has type %u, which is not known",
                         where_of(manifest), (int)name_bytes, name, type);
    if ((type == TYPE_U64 || type == TYPE_F64) && value_bytes != 8)
        return error_set(err, ERR_CORRUPT, "%s: entry %.*s of type %s has %" PRIu32 " bytes, not 8",
                         where_of(manifest), (int)name_bytes, name, type_names[type], value_bytes);
    if (type == TYPE_TEXT && memchr(value, 0, value_bytes))
        return error_set(err, ERR_CORRUPT, "%s: text entry %.*s has a zero byte inside",
                         where_of(manifest), (int)name_bytes, name);
    if (put(manifest, manifest->count, false, name, name_bytes, (enum entry_type)type, value,
            value_bytes, err) < 0)
        return -1;
    if (manifest->count > 1 && strcmp(manifest->entries[manifest->count - 2].name,
                                      manifest->entries[manifest->count - 1].name) >= 0)
        return error_set(err, ERR_CORRUPT, "%s: entries %s and %s are not in order",
                         where_of(manifest), manifest->entries[manifest->count - 2].name,
                         manifest->entries[manifest->count - 1].name);
    *at += ENTRY_HEADER_BYTES + name_bytes + value_bytes;
    return 0;
}

int manifest_decode(enum manifest_kind kind, const uint8_t *data, size_t bytes, const char *where,
                    struct manifest **out, struct error *err)
{
    struct manifest *manifest = NULL;
    uint32_t count;
    size_t at = HEADER_BYTES;
    int rc = -1;

    if (check_header(kind, data, bytes, where, err) < 0)
        goto done;
    count = load_u32(data + 32);
    if (count > ENTRY_COUNT_MAX) {
        error_set(err, ERR_CORRUPT, "%s: claims %" PRIu32 " entries, at most %u fit", where, count,
                  ENTRY_COUNT_MAX);
        goto done;
    }
    manifest = manifest_new(kind);
    if (!manifest || !(manifest->where = strdup(where))) {
        error_set(err, ERR_NOMEM, "%s: no memory", where);
        goto done;
    }
    manifest->features_compat = load_u32(data + 28);
    for (uint32_t i = 0; i < count; i++) {
        if (decode_entry(manifest, data, bytes, &at, err) < 0)
            goto done;
    }
    if (at != bytes) {
        error_set(err, ERR_CORRUPT, "%s: %zu bytes follow the last entry", where, bytes - at);
        goto done;
    }
    *out = manifest;
    manifest = NULL;
    rc = 0;
done:
    manifest_free(manifest);
    return rc;
}

int manifest_read(struct vfs *vfs, enum manifest_kind kind, const char *path, struct manifest **out,
                  struct error *err)
{
    struct error read_err = ERROR_INIT;
    uint8_t *data = NULL;
    size_t bytes = 0;
    int rc = -1;

    if (file_read_whole(vfs, path, MANIFEST_BYTES_MAX, &data, &bytes, &read_err) < 0) {
        /* Too large for a manifest is damage, nobody's bad input. */
        error_set(err, read_err.code == ERR_INVALID ? ERR_CORRUPT : read_err.code, "%s",
                  read_err.message);
        goto done;
    }
    rc = manifest_decode(kind, data, bytes, path, out, err);
done:
    free(data);
    return rc;
}

/* The current file's bytes and generation; *data stays NULL and the generation 0 where there is no
 * file. Only "not found" counts as none: a file that cannot be read must not be replaced. */
static int read_current(struct vfs *vfs, enum manifest_kind kind, const char *path, uint8_t **data,
                        size_t *bytes, uint64_t *generation, struct error *err)
{
    struct manifest *current = NULL;
    struct error read_err = ERROR_INIT;
    int rc = -1;

    *generation = 0;
    if (file_read_whole(vfs, path, MANIFEST_BYTES_MAX, data, bytes, &read_err) < 0) {
        if (read_err.code == ERR_NOT_FOUND)
            rc = 0;
        else
            error_set(err, read_err.code, "%s", read_err.message);
        goto done;
    }
    if (manifest_decode(kind, *data, *bytes, path, &current, err) < 0)
        goto done;
    rc = manifest_get_u64(current, "generation", generation, err);
done:
    manifest_free(current);
    return rc;
}

enum manifest_outcome manifest_publish(struct vfs *vfs, const char *path,
                                       uint64_t expected_generation, struct manifest *manifest,
                                       struct error *err)
{
    enum manifest_outcome outcome = MANIFEST_UNKNOWN;
    uint8_t *old = NULL, *new = NULL;
    size_t old_bytes = 0, new_bytes = 0;
    char previous[FILE_PATH_MAX];
    uint64_t generation = 0;

    if (read_current(vfs, manifest->kind, path, &old, &old_bytes, &generation, err) < 0)
        goto done;
    if (generation != expected_generation || generation == UINT64_MAX) {
        error_set(err, ERR_CONFLICT, "%s: generation %" PRIu64 " was expected, found %" PRIu64,
                  path, expected_generation, generation);
        outcome = MANIFEST_CONFLICT;
        goto done;
    }
    if (manifest_set_u64(manifest, "generation", expected_generation + 1, err) < 0 ||
        manifest_set_u64(manifest, "generation.parent", expected_generation, err) < 0 ||
        manifest_encode(manifest, &new, &new_bytes, err) < 0)
        goto done;
    if (old) {
        int length = snprintf(previous, sizeof previous, "%s.1", path);

        if (length < 0 || (size_t)length >= sizeof previous) {
            error_set(err, ERR_INVALID, "%s: the path is too long", path);
            goto done;
        }
        if (file_publish(vfs, previous, old, old_bytes, err) < 0)
            goto done;
    }
    if (file_publish(vfs, path, new, new_bytes, err) < 0)
        goto done;
    outcome = MANIFEST_DONE;
done:
    free(old);
    free(new);
    return outcome;
}
