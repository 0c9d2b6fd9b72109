/* Canonical minimum edit scripts between int32 token sequences (edit_distance.py says what they are for).

   The table.  D[i][j] is the distance between the suffixes noisy[i:] and clean[j:], so the answer is D[0][0]:

       D[i][j] = D[i+1][j+1]                                           if noisy[i] == clean[j]                 (KEEP)
       D[i][j] = 1 + min(D[i+1][j+1], D[i+1][j], D[i][j+1])            otherwise                     (SUB, DEL, INS)

   The canonical script starts at (0, 0) and takes, wherever it stands, the first of KEEP, SUB, DEL, INS that lies on an
   optimal path. Hence distances of *suffixes*: the table is filled from its far corner, on the reversed sequences, and
   traced from the near one. Equal tokens in front are kept whatever follows, so a common prefix never enters the table.
   A common suffix has to: `a` -> `a a` keeps the first a.

   Only two facts about the table are ever asked: does the diagonal step into a cell cost nothing, and does deletion lie
   on an optimal path. Both come from D without storing D, in one of two ways.

   Close pairs: diagonals (Ukkonen 1985).  Along a diagonal k = i - j, D never grows towards the end. So
   reach[d][k], the smallest i on diagonal k with D <= d, says everything, at a few operations per (d, k) and one
   comparison per token. A pair is seen not to be close when the first edits cover few tokens; little is lost then.

   All others: bits (Myers 1999, in the form of Hyyro 2003).  Neighbouring cells differ by -1, 0 or +1, a diagonal step
   costs 0 or 1, so a column of the table is a few bit vectors, and some fifteen operations on 64-bit words make 64 rows
   of the next column. Call one sequence the pattern (rows r) and the other the text (columns c), both reversed:

       vp, vn   this row is one more, one less than the row before          (vertical differences)
       hp, hn   this column is one more, one less than the column before    (horizontal differences)
       d0       the diagonal step into this cell costs nothing
       eq       the pattern token of this row equals the text token of this column

   Two bits per cell are kept: d0, and "deleting is optimal", which is vp where the pattern is the noisy sequence and hp
   where it is the clean one.

   The wavefront.  A pattern has many words of 64 rows. Word w needs, from the word below it, the horizontal difference
   of that word's last row in the same column. So LANES words run side by side in one vector, each a column behind the
   one below: in step t, lane l is at column t - l. Longer patterns take several such strips, one after the other; of
   short ones, two share a strip, half the lanes each.  */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP, SUB, DEL, INS };
/* Words of a vector: as many as a register of this machine holds (build_ext.py says which machine it is). */
#if defined(__AVX512F__)
enum { LANES = 8 };
#define ONE_UP 8, 0, 1, 2, 3, 4, 5, 6
#elif defined(__AVX2__)
enum { LANES = 4 };
#define ONE_UP 4, 0, 1, 2
#else
enum { LANES = 2 };
#define ONE_UP 2, 0
#endif
enum { STRIP = 64 * LANES, SHORT = STRIP / 2 }; /* table rows of a strip, and of half a strip */

typedef uint64_t vector __attribute__((vector_size(8 * LANES)));

#ifdef __clang__
#define LANES_UP(v, lowest) __builtin_shufflevector(v, (vector){lowest}, ONE_UP)
#else
#define LANES_UP(v, lowest) __builtin_shuffle(v, (vector){lowest}, (vector){ONE_UP})
#endif

typedef struct { /* one pair at work, after its common prefix; the memory is kept from pair to pair */
    const int32_t *noisy, *clean;
    int64_t n, m;
    uint8_t *script; /* where its script goes on, behind the common prefix */
    int64_t *length; /* where the length of its script goes, which so far is that of the prefix */
    char *memory;
    size_t capacity;

    int64_t *reach; /* close pairs: [d][k], see level() */

    const int32_t *pattern, *text;
    int64_t rows, columns, steps;
    int first_lane;     /* 0, but LANES / 2 for the second of two pairs that share a strip */
    vector *bits;       /* [strips][steps][2]: d0, "deleting is optimal" */
    vector *rows_of;    /* [1 + distinct text tokens]: the rows of the strip in which a token stands; [0] is empty */
    uint32_t *text_id;  /* [steps]: the text, reversed, as 1, 2, ... in order of appearance, then 0 */
    uint64_t *carry[2]; /* [steps]: hp and hn of the word below the strip; their highest bit counts */
    uint64_t *slots;    /* hash table of the distinct text tokens: token << 32 | id */
    int slot_bits;
} pair;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* What filling the table by bits costs. */
static int64_t vector_steps(int64_t rows, int64_t columns)
{
    return (rows + STRIP - 1) / STRIP * (columns + LANES - 1);
}

/* Makes room; what the memory held is lost. */
static int reserve(pair *p, size_t bytes)
{
    if (bytes <= p->capacity) return 0;
    free(p->memory);
    p->memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    p->capacity = p->memory ? bytes : 0;
    return p->memory ? 0 : -1;
}

/* ---- Close pairs ---- */

/* reach[d], to be indexed by the diagonal k, which lies within d of the diagonal n - m of the table's far corner. Two
   more entries on either side are far away: level d + 1 goes one diagonal further, and asks that one's neighbour. */
static int64_t *level(const pair *p, int64_t d) { return p->reach + d * (d + 4) + d + 2 - (p->n - p->m); }

/* Fills reach[0 .. distance] and returns the distance, -1 if that would take longer than the bits, -2 out of memory. */
static int64_t fill_diagonals(pair *p)
{
    const int64_t n = p->n, m = p->m, corner = n - m;
    const double budget = 4 * least(n, m) + least(vector_steps(n, m) / 2, 1 << 20); /* entries worth a table of bits */
    if ((double)corner * corner > budget) return -1;
    if (reserve(p, (3 * budget + 32) * sizeof(int64_t))) return -2;
    p->reach = (int64_t *)p->memory;
    for (int64_t d = 0; d <= least(n, m); d++) {
        int64_t *now = level(p, d), furthest = n;
        now[corner - d - 2] = now[corner - d - 1] = now[corner + d + 1] = now[corner + d + 2] = INT64_MAX;
        for (int64_t k = corner - d; k <= corner + d; k++) {
            int64_t i = n;
            if (d > 0) {
                const int64_t *before = level(p, d - 1) + k;
                i = least(before[-1], least(before[0], before[1]) - 1); /* INS, SUB, DEL */
                if (i < 0) i = 0;
                if (i < k) i = k;
            }
            while (i > 0 && i > k && p->noisy[i - 1] == p->clean[i - 1 - k]) i--;
            now[k] = i;
            furthest = least(furthest, i);
        }
        if (-d <= corner && corner <= d && now[0] == 0) return d;
        double expected = d * ((double)n / (n - furthest)); /* edits, if the rest is like what has been seen */
        if (d >= 2 && expected * expected > budget) return -1;
    }
    return -1;
}

static int edit_from_diagonals(const pair *p, int64_t i, int64_t j, int64_t d)
{
    const int64_t *one_edit_less = level(p, d - 1) + i - j;
    return one_edit_less[0] <= i + 1 ? SUB : one_edit_less[1] <= i + 1 ? DEL : INS;
}

/* ---- All others ---- */

static int is_short(const pair *p) { return p->n <= SHORT && p->m <= SHORT; }

static void *carve(char **memory, size_t bytes)
{
    char *part = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return part;
}

/* Which sequence is the pattern, and room for the arrays. Returns -1 when there is none. */
static int set_up(pair *p)
{
    int noisy_is_pattern = vector_steps(p->n, p->m) <= vector_steps(p->m, p->n);
    p->pattern = noisy_is_pattern ? p->noisy : p->clean, p->rows = noisy_is_pattern ? p->n : p->m;
    p->text = noisy_is_pattern ? p->clean : p->noisy, p->columns = noisy_is_pattern ? p->m : p->n;
    p->steps = p->columns + LANES - 1;
    p->first_lane = 0;
    int64_t steps = is_short(p) ? SHORT + LANES - 1 : p->steps; /* its partner may have more columns */
    for (p->slot_bits = 4; (int64_t)1 << p->slot_bits < 8 * p->columns && p->slot_bits < 32; p->slot_bits++);
    for (;;) {
        char *end = p->memory;
        p->rows_of = carve(&end, (1 + p->columns) * sizeof(vector));
        p->text_id = carve(&end, steps * sizeof(uint32_t));
        p->carry[0] = carve(&end, steps * sizeof(uint64_t));
        p->carry[1] = carve(&end, steps * sizeof(uint64_t));
        p->slots = carve(&end, sizeof(uint64_t) << p->slot_bits);
        p->bits = carve(&end, (p->rows + STRIP - 1) / STRIP * steps * 2 * sizeof(vector));
        size_t needed = end - p->memory;
        if (needed <= p->capacity) break;
        if (reserve(p, needed)) return -1;
    }
    memset(p->text_id + p->columns, 0, (steps - p->columns) * sizeof(uint32_t));
    return 0;
}

static uint64_t *find_slot(const pair *p, uint32_t token)
{
    uint64_t last = ((uint64_t)1 << p->slot_bits) - 1;
    uint64_t at = (token * 2654435769u) >> (32 - p->slot_bits);
    /* "Occupied, and by another token" as one product: two branches would be mispredicted often. */
    while (((p->slots[at] >> 32) ^ token) * (uint32_t)p->slots[at] != 0) at = (at + 1) & last;
    return &p->slots[at];
}

static uint32_t number_text(pair *p)
{
    uint32_t distinct = 0;
    memset(p->slots, 0, sizeof(uint64_t) << p->slot_bits);
    for (int64_t c = 0; c < p->columns; c++) {
        uint32_t token = p->text[p->columns - 1 - c];
        uint64_t *slot = find_slot(p, token);
        if (!*slot) *slot = (uint64_t)token << 32 | ++distinct;
        p->text_id[c] = (uint32_t)*slot;
    }
    return distinct;
}

/* The lanes in `late` get what came `steps` steps ago, which the line remembers. */
static inline vector delay(vector now, vector *line, int steps, vector late)
{
    vector out = (now & ~late) | (line[steps - 1] & late);
    for (int k = steps - 1; k > 0; k--) line[k] = line[k - 1];
    line[0] = now;
    return out;
}

/* Lane l must see the eq of column t - l: delays of one, two and four steps spell l in binary. Before its column 0 a
   lane gets hn, not hp, from below: vp and vn stay as they are. Between two short pairs there is no delay, and the
   upper one, too, stands on the table's edge. */
static void fill_strip(const pair *low, const pair *high, vector *bits, int is_last)
{
    const vector none = {0};
    vector one = none, two = none, upper = none, edge = none;
    for (int l = 0; l < LANES; l++) one[l] = -(l & 1), two[l] = -(l >> 1 & 1), upper[l] = -(l >= LANES / 2);
    vector rows_delete = low->pattern == low->noisy ? ~upper : none;
    if (high->pattern == high->noisy) rows_delete |= upper;
    if (low != high) upper = none, edge[LANES / 2] = -1;

    uint64_t *carry_p = low->carry[0], *carry_n = low->carry[1];
    vector vp = ~none, vn = none, hp = none, hn = ~none;
    vector line_1[1] = {0}, line_2[2] = {0}, line_half[LANES / 2] = {0};
    for (int64_t t = 0; t < low->steps; t++) {
        vector eq = low->rows_of[low->text_id[t]] | high->rows_of[high->text_id[t]];
        if (LANES > 2) eq = delay(eq, line_1, 1, one);
        if (LANES > 4) eq = delay(eq, line_2, 2, two);
        eq = delay(eq, line_half, LANES / 2, upper);

        vector hp_below = (LANES_UP(hp, carry_p[t]) | edge) >> 63;
        vector hn_below = (LANES_UP(hn, carry_n[t]) & ~edge) >> 63;
        eq |= hn_below;
        vector d0 = (((eq & vp) + vp) ^ vp) | eq | vn;
        hp = vn | ~(d0 | vp);
        hn = vp & d0;
        vector hp_up = hp << 1 | hp_below, hn_up = hn << 1 | hn_below;
        vp = hn_up | ~(d0 | hp_up);
        vn = hp_up & d0;

        bits[2 * t] = d0;
        bits[2 * t + 1] = (vp & rows_delete) | (hp & ~rows_delete);
        if (!is_last && t >= LANES - 1) {
            carry_p[t - (LANES - 1)] = hp[LANES - 1];
            carry_n[t - (LANES - 1)] = hn[LANES - 1];
        }
    }
}

static void find_rows(pair *p, int64_t first, uint32_t distinct)
{
    memset(p->rows_of, 0, (1 + (size_t)distinct) * sizeof(vector));
    for (int64_t r = 0; r < least(STRIP, p->rows - first); r++) {
        uint32_t id = *find_slot(p, p->pattern[p->rows - 1 - first - r]);
        ((uint64_t *)&p->rows_of[id])[p->first_lane + r / 64] |= (uint64_t)1 << r % 64;
    }
    p->rows_of[0] = (vector){0};
}

/* One pair (low == high) or two short ones. */
static void fill_bits(pair *low, pair *high)
{
    uint32_t distinct = number_text(low);
    if (low != high) {
        high->first_lane = LANES / 2;
        high->bits = low->bits;
        low->steps = high->steps = low->steps < high->steps ? high->steps : low->steps;
        find_rows(high, 0, number_text(high));
    }
    for (int64_t t = 0; t < low->steps; t++) low->carry[0][t] = -1, low->carry[1][t] = 0; /* the edge grows by one */
    for (int64_t first = 0; first < low->rows; first += STRIP) {
        find_rows(low, first, distinct);
        fill_strip(low, high, low->bits + first / STRIP * low->steps * 2, first + STRIP >= low->rows);
    }
}

static inline int edit_from_bits(const pair *p, int64_t i, int64_t j)
{
    uint64_t from_end_of_noisy = p->n - 1 - i, from_end_of_clean = p->m - 1 - j;
    uint64_t r = p->pattern == p->noisy ? from_end_of_noisy : from_end_of_clean;
    uint64_t c = p->pattern == p->noisy ? from_end_of_clean : from_end_of_noisy;
    uint64_t lane = r / 64 % LANES;
    const uint64_t *word = (uint64_t *)&p->bits[(r / STRIP * p->steps + c + lane) * 2] + p->first_lane + lane;
    if (!(word[0] >> r % 64 & 1)) return SUB;
    return INS - (word[LANES] >> r % 64 & 1);
}

/* ---- What Python calls ---- */

/* Writes the script from the left. d is the distance of a close pair, else -1. */
static void trace(const pair *p, int64_t d)
{
    int64_t i = 0, j = 0;
    uint8_t *script = p->script;
    while (i < p->n && j < p->m) {
        if (p->noisy[i] == p->clean[j]) {
            *script++ = KEEP, i++, j++;
            continue;
        }
        int op = d >= 0 ? edit_from_diagonals(p, i, j, d--) : edit_from_bits(p, i, j);
        *script++ = op;
        i += op != INS, j += op != DEL;
    }
    memset(script, DEL, p->n - i), script += p->n - i;
    memset(script, INS, p->m - j), script += p->m - j;
    *p->length += script - p->script;
}

/* Scripts of pairs first, first + step, ... of all `pairs`. Sequences lie end to end, between their fences; the script
   of pair b starts at noisy_fence[b] + clean_fence[b] and has length[b] columns. Returns -1 when out of memory. */
int edit_scripts(int64_t pairs, int64_t first, int64_t step, const int32_t *noisy, const int64_t *noisy_fence,
                 const int32_t *clean, const int64_t *clean_fence, uint8_t *script, int64_t *length)
{
    pair work[2] = {0};
    int waiting = 0, failed = 0; /* work[0] may be waiting for another short pair */
    for (int64_t b = first; b < pairs && !failed; b += step) {
        pair *p = &work[waiting];
        p->noisy = noisy + noisy_fence[b], p->n = noisy_fence[b + 1] - noisy_fence[b];
        p->clean = clean + clean_fence[b], p->m = clean_fence[b + 1] - clean_fence[b];
        p->script = script + noisy_fence[b] + clean_fence[b], p->length = &length[b];
        int64_t same = 0, d = 0;
        while (same < least(p->n, p->m) && p->noisy[same] == p->clean[same]) p->script[same++] = KEEP;
        p->noisy += same, p->n -= same, p->clean += same, p->m -= same, p->script += same, *p->length = same;

        if (p->n && p->m) d = fill_diagonals(p);
        failed = d == -2 || (d == -1 && set_up(p));
        if (d >= 0) {
            trace(p, d);
        } else if (failed) {
            break;
        } else if (!is_short(p)) {
            fill_bits(p, p), trace(p, -1);
        } else if (!waiting) {
            waiting = 1;
        } else {
            fill_bits(&work[0], &work[1]), trace(&work[0], -1), trace(&work[1], -1);
            waiting = 0;
        }
    }
    if (waiting) fill_bits(&work[0], &work[0]), trace(&work[0], -1);
    free(work[0].memory), free(work[1].memory);
    return failed ? -1 : 0;
}

/* The two targets of ME-DLM for the same pairs (edit_distance.py says what they mean), read from the right so that the
   token standing to the right of a gap is known when the gap is reached. */
void edit_labels(int64_t pairs, int64_t first, int64_t step, const int64_t *noisy_fence, const int32_t *clean,
                 const int64_t *clean_fence, const uint8_t *script, const int64_t *length, int64_t del_id,
                 int64_t eos_id, int64_t ignore_id, int64_t *token_target, int64_t *insert_target)
{
    for (int64_t b = first; b < pairs; b += step) {
        int64_t i = noisy_fence[b + 1], j = clean_fence[b + 1], right = eos_id;
        const uint8_t *op = script + noisy_fence[b] + clean_fence[b];
        for (int64_t k = length[b] - 1; k >= 0; k--) {
            if (op[k] == INS) {
                right = clean[--j];
                continue;
            }
            insert_target[i-- + b] = op[k] == DEL ? ignore_id : right;
            token_target[i] = op[k] == DEL ? del_id : (right = clean[--j]);
        }
        insert_target[i + b] = right;
    }
}
