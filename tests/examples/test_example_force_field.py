"""The force field of examples/force_field.py, trained briefly."""

import sys
from pathlib import Path

import numba
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import force_field


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    potential = force_field.Classical()
    x = force_field.sample(potential, 640, np.random.default_rng(0), every=20)
    return x, *potential(x)


def test_data(data):
    x, energies, forces = data
    moves = 1e-4 * np.eye(27).reshape(-1, 9, 3)
    potential = force_field.Classical()
    slope = (potential(x[0] + moves)[0] - potential(x[0] - moves)[0]).reshape(9, 3) / 2e-4
    np.testing.assert_allclose(forces[0], -slope, atol=1e-6)
    np.testing.assert_allclose(forces.sum(1), 0, atol=1e-10)
    # Equipartition: nearly harmonic, so the energy above rest is k T / 2 for each of 21 vibrations.
    above = energies.mean() - potential(force_field.REST)[0]
    assert above == pytest.approx(21 / 2 * force_field.KELVIN * 500, rel=0.2)


def test_gradients_of_the_whole_model(data):
    x, energies, forces = (a[:3] for a in data)
    model = force_field.ForceField(heads=2, features=3, hidden=5, functions=4, rng=1)

    def loss():
        energy, force, _ = model.forward(x)
        return ((energy - energies) ** 2).sum() / 2 + ((force - forces) ** 2).sum() / 2

    energy, force, ctx = model.forward(x)
    grads = model.gradients(energy - energies, force - forces, ctx)
    assert grads.keys() == model.parameters.keys()
    rng = np.random.default_rng(2)
    for name, parameter in model.parameters.items():
        direction, values = rng.standard_normal(parameter.shape), []
        for step in (1e-6, -2e-6, 1e-6):
            parameter += step * direction
            values.append(loss())
        assert np.vdot(grads[name], direction) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5), name


def test_learns_and_conserves_energy(data):
    x, energies, forces = data
    rng = np.random.default_rng(0)
    model = force_field.ForceField(rng=rng)
    force_field.train(model, x[:512], energies[:512], forces[:512], 150, rng, tell=lambda text: None)
    of_energy, of_force = force_field.errors(model, x[512:], energies[512:], forces[512:])
    assert of_force < 0.3 * 1000 * forces.std()
    assert of_energy < 0.5 * 1000 * energies.std()
    assert force_field.difference(model, x[-1]) < 1e-6
    v = np.sqrt(force_field.KELVIN * 300 / force_field.MASSES) * rng.standard_normal((9, 3))
    totals, kinetics = force_field.simulate(model, x[-1], v, 200)
    assert totals.std() < 0.05 * kinetics.std()
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    energy, force, _ = model.forward(x[0])
    again, turned, _ = model.forward(x[0] @ turn + 1)
    assert again == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(turned, force @ turn, atol=1e-9)
