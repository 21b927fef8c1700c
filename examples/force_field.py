"""Learn the forces in a molecule: a small force field with attention over atoms, trained on forces, and simulated.

    python examples/force_field.py

Ethanol moves at 500 K in a classical force field (springs, Lennard-Jones, charges), which makes the data: positions,
energies and forces. The model knows elements and distances, and nothing of bonds. An atom attends to the others with
weights that depend on distances, by a learned function for each pair of elements and each head; what it gathers gives
its part of the energy. Forces are minus the gradient of the energy, so the gradient of a loss of forces has second
derivatives of attention: `attention_double_backward`, here of the bias. Such a model conserves energy, however good.

References
----------
.. [1] Behler and Parrinello, "Generalized Neural-Network Representation of High-Dimensional Potential-Energy
   Surfaces", 2007: the energy as a sum over atoms.
.. [2] Chmiela et al., "Machine learning of accurate energy-conserving molecular force fields", 2017: data of forces.
.. [3] Thölke and De Fabritiis, "TorchMD-NET", 2022, section 3: attention over atoms, with distances in the weights.
.. [4] Leimkuhler and Matthews, "Rational construction of stochastic numerical methods", 2013: the thermostat BAOAB.
"""

import argparse
import time

import numba
import numpy as np

import numba_attention as na
from numba_attention.nn import Adam, Linear, warmup_cosine

# Units: eV, angstrom and the mass of a nucleon, so that the unit of time is 10.18 fs.
FEMTOSECOND, KELVIN, KCAL, COULOMB = 1 / 10.1805, 8.617e-5, 0.04336, 14.4
ELEMENTS = "CHO"
ATOMS = "CCOHHHHHH"
BONDS = [(0, 1), (1, 2), (2, 3), (1, 4), (1, 5), (0, 6), (0, 7), (0, 8)]
MASSES = np.array([{"C": 12.011, "H": 1.008, "O": 15.999}[a] for a in ATOMS])[:, None]
REST = np.array([  # positions of rest, the anti conformer
    [1.168, -0.400, 0], [0, 0.559, 0], [-1.190, -0.215, 0], [-1.947, 0.382, 0], [0.043, 1.208, 0.887],
    [0.043, 1.208, -0.887], [2.116, 0.145, 0], [1.129, -1.037, 0.886], [1.129, -1.037, -0.886],
])  # fmt: skip


class Classical:
    """The force field that the data are of: springs between atoms one or two bonds apart, and what others repel by."""

    def __init__(self):
        n = len(ATOMS)
        apart = np.full((n, n), 9)  # bonds between two atoms, as far as it matters
        for i, j in BONDS:
            apart[i, j] = apart[j, i] = 1
        apart[((apart == 1).astype(int) @ (apart == 1) > 0) & (apart > 2)] = 2
        self.i, self.j = np.triu_indices(n, 1)
        bonds = apart[self.i, self.j]
        self.rest = np.linalg.norm(REST[self.i] - REST[self.j], axis=-1)
        self.spring = KCAL * np.select([bonds == 1, bonds == 2], [660.0, 140.0], 0)
        charges = np.array([-0.18, 0.145, -0.683, 0.418, 0.06, 0.06, 0.06, 0.06, 0.06])  # OPLS
        sigma = np.array([{"C": 3.2, "H": 2.2, "O": 2.9}[a] for a in ATOMS])
        self.charge = COULOMB * charges[self.i] * charges[self.j] * (bonds > 2)
        self.depth = KCAL * 0.05 * (bonds > 2)
        self.sigma = (sigma[self.i] + sigma[self.j]) / 2

    def __call__(self, x):
        """Energies and forces of molecules (..., atoms, 3)."""
        d = x[..., self.i, :] - x[..., self.j, :]
        r = np.linalg.norm(d, axis=-1)
        six = (self.sigma / r) ** 6
        stretch = r - self.rest
        energy = self.spring / 2 * stretch**2 + 4 * self.depth * (six**2 - six) + self.charge / r
        slope = self.spring * stretch + 4 * self.depth * (6 * six - 12 * six**2) / r - self.charge / r**2
        pull = (slope / r)[..., None] * d
        force = np.zeros_like(x)
        for n, (i, j) in enumerate(zip(self.i, self.j, strict=True)):
            force[..., i, :] -= pull[..., n, :]
            force[..., j, :] += pull[..., n, :]
        return energy.sum(-1), force


def sample(potential, count, rng, replicas=256, kelvin=500.0, step=0.5 * FEMTOSECOND, every=50, friction=0.1):
    """Positions (count, atoms, 3) from molecules that move at a temperature."""
    x = np.repeat(REST[None], replicas, 0)
    spread = np.sqrt(KELVIN * kelvin / MASSES)
    v = spread * rng.standard_normal(x.shape)
    decay, kept = np.exp(-friction), []
    _, force = potential(x)
    for n in range(8 * every + -(-count // replicas) * every):
        v += step / 2 * force / MASSES
        x = x + step / 2 * v
        v = decay * v + np.sqrt(1 - decay**2) * spread * rng.standard_normal(x.shape)
        x = x + step / 2 * v
        _, force = potential(x)
        v += step / 2 * force / MASSES
        if n >= 8 * every and n % every == 0:
            kept.append(x)
    return np.concatenate(kept)[:count]


class ForceField:
    """An energy that is a function of elements and distances, with forces and the gradient of a loss of both.

    Parameters
    ----------
    heads, features, hidden, functions : int
        Of attention, of a head, of the network that reads an atom, and radial functions of the bias.
    rng : numpy.random.Generator or int
    """

    def __init__(self, heads=12, features=8, hidden=64, functions=24, rng=0):
        rng = np.random.default_rng(rng)
        kinds = len(ELEMENTS)
        self.element = np.array([ELEMENTS.index(a) for a in ATOMS])
        self.centres = np.linspace(0.8, 4.5, functions)
        self.width = self.centres[1] - self.centres[0]
        read = heads * (features + 1)
        shapes = {
            "query": (heads, kinds, features), "key": (heads, kinds, features), "value": (heads, kinds, features),
            "radial": (heads, functions, kinds, kinds), "shift": (kinds, hidden),
            "energy": (hidden,), "level": (1,),
        }  # fmt: skip
        scale = {"energy": hidden**-0.5, "level": 0.0}
        self.parameters = {name: scale.get(name, 1.0) * rng.standard_normal(s) for name, s in shapes.items()}
        self.read = Linear(read, hidden, bias=False, rng=rng, dtype=np.float64)
        self.parameters["read"] = self.read.parameters()["weight"]
        self.options = {"mask": ~np.eye(len(ATOMS), dtype=bool)}  # an atom does not attend to itself

    def _geometry(self, x):
        """Unit vectors and distances of all pairs, and the radial functions with two derivatives, (..., i, j, k)."""
        d = x[..., :, None, :] - x[..., None, :, :]
        r = np.sqrt((d**2).sum(-1)) + np.eye(len(ATOMS))
        off = (r[..., None] - self.centres) / self.width
        value = np.exp(-(off**2) / 2)
        return d / r[..., None], value, -off / self.width * value

    def _bias(self, functions):
        """Sum radial functions (..., i, j, k) to a bias (..., head, i, j)."""
        table = self.parameters["radial"][:, :, self.element[:, None], self.element]  # (head, k, i, j)
        return np.einsum("...ijk,hkij->...hij", functions, table, optimize=True)

    def forward(self, x):
        """Energies (...,), forces (..., atoms, 3), and what `gradients` needs, of molecules (..., atoms, 3)."""
        p = self.parameters
        unit, value, slope = self._geometry(x)
        heads = [np.broadcast_to(p[n][:, self.element], (*x.shape[:-2], *p[n][:, self.element].shape)) for n in
                 ("query", "key", "value")]  # fmt: skip
        options = self.options | {"bias": self._bias(value)}
        out, lse = na.attention(*heads, return_lse=True, **options)
        seen = np.concatenate([*np.moveaxis(out, -3, 0), np.moveaxis(lse, -2, -1)], -1)  # (..., atoms, read)
        t = np.tanh(self.read(seen) + p["shift"][self.element])
        energy = (t @ p["energy"]).sum(-1) + p["level"][0]

        grad_hidden = (1 - t**2) * p["energy"]
        grad_out, grad_lse = self._split(self.read.backward(grad_hidden, seen))
        grads = na.attention_backward(grad_out, *heads, out, lse, grad_lse=grad_lse, **options)
        bias_slope = self._bias(slope)
        pull = (grads.bias * bias_slope).sum(-3)  # the derivative of the energy by the distance from i to j
        force = -((pull + pull.swapaxes(-1, -2))[..., None] * unit).sum(-2)
        ctx = (heads, options, out, lse, seen, t, grad_hidden, grad_out, grad_lse, grads.bias, bias_slope, unit, value,
               slope)  # fmt: skip
        return energy, force, ctx

    def _split(self, grad):
        """Gradients of `out` and `lse` from that of what the network reads."""
        heads, _, features = self.parameters["query"].shape
        of_out = grad[..., : heads * features].reshape(*grad.shape[:-1], heads, features)
        return np.moveaxis(of_out, -2, -3), np.moveaxis(grad[..., heads * features :], -1, -2)

    def gradients(self, grad_energy, grad_force, ctx):
        """Gradients of a loss by the parameters, from those by energies (...,) and forces (..., atoms, 3)."""
        (heads, options, out, lse, seen, t, grad_hidden, grad_out, grad_lse, grad_bias, bias_slope, unit, value,
         slope) = ctx  # fmt: skip
        # From the forces to the gradient of the bias, and its gradient by what `attention_backward` was called with.
        along = -((grad_force[..., :, None, :] - grad_force[..., None, :, :]) * unit).sum(-1)[..., None, :, :]
        second = na.attention_double_backward(
            na.Gradients(None, None, None, along * bias_slope), grad_out, *heads, out, lse, grad_lse=grad_lse, **options
        )
        # Through the gradient of the network that reads the atoms, and through the network itself.
        moved = np.concatenate([*np.moveaxis(second.grad_out, -3, 0), np.moveaxis(second.grad_lse, -2, -1)], -1)
        through = self.read(moved)
        weight = grad_energy[..., None, None]
        of_hidden = -2 * t * grad_hidden * through + weight * grad_hidden
        self.read.backward(grad_hidden, moved)
        of_read = self.read.grads["weight"]
        of_out, of_lse = self._split(self.read.backward(of_hidden, seen))
        last = na.attention_backward(of_out, *heads, out, lse, grad_lse=of_lse, **options)
        flat = (-1, t.shape[-1])
        grads = {
            "read": of_read + self.read.grads["weight"],
            "energy": ((1 - t**2) * through + weight * t).reshape(flat).sum(0),
            "level": np.array([grad_energy.sum()]),
        }
        of_table = np.einsum("...hij,...ijk->hkij", second.bias + last.bias, value, optimize=True)
        of_table += np.einsum("...hij,...ijk->hkij", along * grad_bias, slope, optimize=True)
        grads["radial"] = self._by_element(self._by_element(of_table, -1), -2)
        grads["shift"] = self._by_element(np.moveaxis(of_hidden.reshape(-1, *of_hidden.shape[-2:]).sum(0), 0, -1), -1).T
        for name in ("query", "key", "value"):
            grad = getattr(second, name) + getattr(last, name)
            grad = grad.reshape(-1, *grad.shape[-3:]).sum(0)  # (head, atom, feature)
            grads[name] = self._by_element(grad, 1)
        return grads

    def _by_element(self, x, axis):
        """Sum an axis of atoms to one of elements."""
        is_element = (self.element[:, None] == np.arange(len(ELEMENTS))).astype(x.dtype)
        return np.moveaxis(np.moveaxis(x, axis, -1) @ is_element, -1, axis)


def train(model, x, energies, forces, steps, rng, batch=32, rate=1e-2, tell=print):
    """Adam on forces, and a little on energies."""
    model.parameters["level"][:] = energies.mean()
    optimiser = Adam(model.parameters, rate=rate)
    begin, errors = time.perf_counter(), []
    for step in range(steps):
        chosen = rng.choice(len(x), batch, replace=False)
        energy, force, ctx = model.forward(x[chosen])
        off, off_force = energy - energies[chosen], force - forces[chosen]
        errors.append(np.mean(off_force**2))
        grads = model.gradients(0.02 * off / batch, off_force / off_force.size * 3, ctx)
        optimiser.step(grads, warmup_cosine(step, steps))
        if (step + 1) % max(1, steps // 8) == 0:
            error = 1000 * np.sqrt(np.mean(errors[-50:]))
            tell(f"step {step + 1:5}: force error {error:6.1f} meV/A, {time.perf_counter() - begin:.0f} s")


def errors(model, x, energies, forces):
    """Root mean square errors of energies (meV per molecule, without a constant) and forces (meV per angstrom)."""
    energy, force, _ = model.forward(x)
    return 1000 * np.std(energy - energies), 1000 * np.sqrt(np.mean((force - forces) ** 2))


def difference(model, x, step=1e-4):
    """The largest difference of the forces on one molecule from central differences of the energy, in eV/A."""
    moves = step * np.eye(x.size).reshape(-1, *x.shape)
    energy = model.forward(np.concatenate([x + moves, x - moves]))[0].reshape(2, -1)
    want = -(energy[0] - energy[1]).reshape(x.shape) / (2 * step)
    return np.abs(model.forward(x)[1] - want).max()


def simulate(model, x, v, steps, step=0.25 * FEMTOSECOND):
    """Velocity Verlet without a thermostat; total energies (steps + 1,) in eV, and the kinetic ones."""
    potential, force, _ = model.forward(x)
    totals, kinetics = [], []
    for _ in range(steps + 1):
        kinetic = (MASSES * v**2).sum() / 2
        totals.append(potential + kinetic)
        kinetics.append(kinetic)
        v = v + step / 2 * force / MASSES
        x = x + step * v
        potential, force, _ = model.forward(x)
        v = v + step / 2 * force / MASSES
    return np.array(totals), np.array(kinetics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Calls of a millisecond gain little from a second thread, and on a busy machine they wait for it.
    numba.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    classical = Classical()
    x = sample(classical, 4352, rng)
    energies, forces = classical(x)
    few, rest = slice(0, 4096), slice(4096, None)
    print(f"4096 molecules to learn from, 256 to test with; forces of {1000 * forces.std():.0f} meV/A")
    model = ForceField(rng=rng)
    train(model, x[few], energies[few], forces[few], arguments.steps, rng)
    of_energy, of_force = errors(model, x[rest], energies[rest], forces[rest])
    print(f"test: force error {of_force:.1f} meV/A; energy error {of_energy:.1f} meV of {1000 * energies.std():.0f}")
    print(f"forces against finite differences of the energy: {difference(model, x[-1]):.1e} eV/A at most")
    v = np.sqrt(KELVIN * 300 / MASSES) * rng.standard_normal(REST.shape)
    v -= (MASSES * v).sum(0) / MASSES.sum()
    begin = time.perf_counter()
    totals, kinetics = simulate(model, x[-1], v, 4000)
    drift = np.polyfit(np.arange(len(totals)) / 4000, totals, 1)[0]
    print(
        f"1 ps without a thermostat, 4000 steps in {time.perf_counter() - begin:.0f} s: kinetic energy "
        f"{1000 * kinetics.mean():.0f} +- {1000 * kinetics.std():.0f} meV, "
        f"total energy +- {1000 * totals.std():.2f} meV, drift {1000 * drift:.2f} meV/ps"
    )


if __name__ == "__main__":
    main()
