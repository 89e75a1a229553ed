/* getopt_long does not know tables, choices or near misses, and prints its own messages; the little
 * it would save is done here. `--name VALUE`, `--name=VALUE` and `--` are understood. */
#include "tools/options.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t edit_distance(const char *a, const char *b)
{
    uint32_t row[64], n = (uint32_t)strlen(b);

    if (n > 62 || strlen(a) > 62)
        return 99;
    for (uint32_t j = 0; j <= n; j++)
        row[j] = j;
    for (uint32_t i = 1; a[i - 1]; i++) {
        uint32_t diagonal = row[0];

        row[0] = i;
        for (uint32_t j = 1; j <= n; j++) {
            uint32_t cost = diagonal + (a[i - 1] != b[j - 1]);

            diagonal = row[j];
            if (row[j] + 1 < cost)
                cost = row[j] + 1;
            if (row[j - 1] + 1 < cost)
                cost = row[j - 1] + 1;
            row[j] = cost;
        }
    }
    return row[n];
}

const char *options_nearest(const char *text, const char *const *names)
{
    const char *best = NULL;
    uint32_t best_distance = 3 + (uint32_t)strlen(text) / 4;

    for (; *names; names++) {
        uint32_t distance = edit_distance(text, *names);

        if (distance < best_distance) {
            best = *names;
            best_distance = distance;
        }
    }
    return best;
}

static const char *dashes(const char *name)
{
    return name[1] ? "--" : "-";
}

static int find(const struct command *command, const char *name, size_t bytes)
{
    for (int i = 0; command->options[i].name; i++)
        if (strlen(command->options[i].name) == bytes &&
            !memcmp(command->options[i].name, name, bytes))
            return i;
    return -1;
}

static int unknown(const struct command *command, const char *word, struct error *err)
{
    const char *names[OPTIONS_MAX + 1];
    int n = 0;
    char name[64];

    snprintf(name, sizeof name, "%.*s", (int)strcspn(word + strspn(word, "-"), "="),
             word + strspn(word, "-"));
    for (; command->options[n].name; n++)
        names[n] = command->options[n].name;
    names[n] = NULL;
    const char *near = options_nearest(name, names);

    error_set(err, ERR_INVALID, "annd %s has no option %s", command->name, word);
    if (near)
        error_remedy(err, "did you mean %s%s?", dashes(near), near);
    else
        error_remedy(err, "annd %s --help lists them", command->name);
    return -1;
}

int option_size_parse(const char *text, uint64_t *bytes)
{
    char *end;
    uint64_t unit = 1;

    errno = 0;
    double value = strtod(text, &end);

    if (end == text || errno || !(value >= 0) || !isdigit((unsigned char)text[0]))
        return -1;
    switch (toupper((unsigned char)*end)) {
    case 'T':
        unit <<= 10;
        /* fall through */
    case 'G':
        unit <<= 10;
        /* fall through */
    case 'M':
        unit <<= 10;
        /* fall through */
    case 'K':
        unit <<= 10;
        end++;
        if (*end == 'i')
            end++;
        break;
    default:
        break;
    }
    if (toupper((unsigned char)*end) == 'B')
        end++;
    if (*end || value * (double)unit >= 9.2e18)
        return -1;
    *bytes = (uint64_t)(value * (double)unit);
    return 0;
}

static bool choice_allows(const char *choices, const char *value)
{
    size_t bytes = strlen(value);

    for (const char *c = choices; *c; c += strcspn(c, "|"), c += *c == '|')
        if (strcspn(c, "|") == bytes && !strncasecmp(c, value, bytes))
            return true;
    return false;
}

static int value_check(const struct option *option, const char *value, struct error *err)
{
    char *end;
    uint64_t number = 0;

    if (option->choices && !choice_allows(option->choices, value))
        return error_set(err, ERR_INVALID, "%s%s takes %s, not '%s'", dashes(option->name),
                         option->name, option->choices, value);
    if (option->kind == OPTION_SIZE && option_size_parse(value, &number) < 0)
        return error_set(err, ERR_INVALID, "%s%s takes a size such as 64M or 2GiB, not '%s'",
                         dashes(option->name), option->name, value);
    if (option->kind == OPTION_NUMBER) {
        errno = 0;
        number = strtoull(value, &end, 10);
        if (!isdigit((unsigned char)value[0]) || *end || errno)
            return error_set(err, ERR_INVALID, "%s%s takes a whole number, not '%s'",
                             dashes(option->name), option->name, value);
    }
    if ((option->kind == OPTION_NUMBER || option->kind == OPTION_SIZE) && option->max &&
        (number < option->min || number > option->max))
        return error_set(err, ERR_INVALID, "%s%s takes %llu to %llu, not %s", dashes(option->name),
                         option->name, (unsigned long long)option->min,
                         (unsigned long long)option->max, value);
    if (option->kind == OPTION_REAL) {
        strtod(value, &end);
        if (end == value || *end)
            return error_set(err, ERR_INVALID, "%s%s takes a number, not '%s'",
                             dashes(option->name), option->name, value);
    }
    return 0;
}

static uint32_t words(const char *text)
{
    uint32_t n = *text != 0;

    for (; *text; text++)
        n += *text == ' ';
    return n;
}

int options_parse(const struct command *command, int argc, char **argv, struct arguments *out,
                  bool *help, struct error *err)
{
    bool only_positional = false;

    memset(out, 0, sizeof *out);
    *help = false;
    out->command = command;
    for (int i = 0; command->options[i].name; i++)
        out->values[i] = command->options[i].initial;
    for (int a = 0; a < argc; a++) {
        const char *word = argv[a];

        if (!only_positional && !strcmp(word, "--")) {
            only_positional = true;
            continue;
        }
        if (!only_positional && (!strcmp(word, "--help") || !strcmp(word, "-h"))) {
            *help = true;
            return 0;
        }
        if (only_positional || word[0] != '-' || !word[1]) {
            if (out->positional_count == words(command->positional))
                return error_set(err, ERR_INVALID, "annd %s does not know what to do with '%s'",
                                 command->name, word);
            out->positional[out->positional_count++] = word;
            continue;
        }
        const char *name = word + 1 + (word[1] == '-');
        size_t bytes = strcspn(name, "=");
        int i = find(command, name, bytes);

        if (i < 0 || (word[1] == '-') != (bytes > 1))
            return unknown(command, word, err);
        const struct option *option = &command->options[i];

        out->given[i] = true;
        if (option->kind == OPTION_FLAG) {
            if (name[bytes])
                return error_set(err, ERR_INVALID, "--%s takes no value", option->name);
            out->values[i] = "";
            continue;
        }
        if (name[bytes])
            out->values[i] = name + bytes + 1;
        else if (a + 1 < argc)
            out->values[i] = argv[++a];
        else
            return error_set(err, ERR_INVALID, "%s%s needs a value: %s", dashes(option->name),
                             option->name, option->argument);
        if (value_check(option, out->values[i], err) < 0)
            return -1;
    }
    if (out->positional_count < words(command->positional)) {
        error_set(err, ERR_INVALID, "annd %s needs %s", command->name, command->positional);
        error_remedy(err, "annd %s --help shows how it is called", command->name);
        return -1;
    }
    return 0;
}

void options_print_help(const struct command *command)
{
    printf("%s\n\nusage: annd %s%s%s [options]\n\nexamples:\n%s\noptions:\n", command->summary,
           command->name, *command->positional ? " " : "", command->positional, command->examples);
    for (const struct option *o = command->options; o->name; o++) {
        char left[64];

        snprintf(left, sizeof left, "%s%s %s", dashes(o->name), o->name,
                 o->argument ? o->argument : "");
        printf("  %-26s %s", left, o->help);
        if (o->choices)
            printf(" (%s)", o->choices);
        if (o->initial)
            printf(" [%s]", o->initial);
        printf("\n");
    }
    printf("  %-26s %s\n", "--help ", "this text");
}

static int index_of(const struct arguments *arguments, const char *name)
{
    return find(arguments->command, name, strlen(name));
}

bool option_given(const struct arguments *arguments, const char *name)
{
    int i = index_of(arguments, name);

    return i >= 0 && arguments->given[i];
}

bool option_flag(const struct arguments *arguments, const char *name)
{
    return option_given(arguments, name);
}

const char *option_text(const struct arguments *arguments, const char *name)
{
    int i = index_of(arguments, name);

    return i < 0 ? NULL : arguments->values[i];
}

uint64_t option_u64(const struct arguments *arguments, const char *name)
{
    const char *text = option_text(arguments, name);
    uint64_t value = 0;

    if (!text)
        return 0;
    if (arguments->command->options[index_of(arguments, name)].kind == OPTION_SIZE)
        option_size_parse(text, &value);
    else
        value = strtoull(text, NULL, 10);
    return value;
}

uint32_t option_u32(const struct arguments *arguments, const char *name)
{
    uint64_t value = option_u64(arguments, name);

    return value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
}

double option_real(const struct arguments *arguments, const char *name)
{
    const char *text = option_text(arguments, name);

    return text ? strtod(text, NULL) : 0;
}

int option_list(const struct arguments *arguments, const char *name, uint32_t min, uint32_t max,
                uint32_t *out, uint32_t *count, struct error *err)
{
    const char *text = option_text(arguments, name);
    uint32_t room = *count;

    *count = 0;
    for (const char *p = text ? text : ""; *p;) {
        char *end;
        unsigned long long value = strtoull(p, &end, 10);

        if (!isdigit((unsigned char)*p) || (*end && *end != ',') || value < min || value > max)
            return error_set(err, ERR_INVALID,
                             "--%s takes numbers from %u to %u with commas, "
                             "such as 16,24,32; not '%s'",
                             name, min, max, text);
        if (*count == room)
            return error_set(err, ERR_INVALID, "--%s takes at most %u numbers", name, room);
        out[(*count)++] = (uint32_t)value;
        p = *end ? end + 1 : end;
    }
    return 0;
}
